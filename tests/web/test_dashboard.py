"""What people see: curves that move, tables that sort, stories that open; narrow, dark, without scripts, attacked."""

import json
import re

import sqlalchemy as sa

from farflung.store.tables import NODES, ROLLOUTS, TASKS

HOSTILE = "\"'><img src=x onerror=window.pwned=1><script>window.pwned=1</script>{{7*7}}\u202e"
PATHS = ("/", "/rollouts", "/weights", "/ledger")


def another_step(number: int):
    """A scenario: one more step."""

    async def scenario(house) -> None:
        while await house.claim_step(number) is None:
            await house.work("ada")
            await house.audit()
            await house.score()
        await house.step(number)

    return scenario


def test_the_curve_moves_without_a_reload(site, look) -> None:
    page = look("/")
    page.wait_for_selector("#link.up")
    curve = page.locator('[data-curve="reward"]')
    assert curve.get_attribute("data-count") == "1"
    page.evaluate("window.here = true")
    site.play(another_step(2))
    page.wait_for_selector('[data-curve="reward"][data-count="2"]')
    page.wait_for_selector("#head >> text=step 2")
    assert page.evaluate("window.here"), "the page was loaded again"
    assert page.locator('[data-curve="reward"] canvas').count() == 1


async def evaluated(house) -> None:
    """Every evaluation that is due."""
    while (lease := await house.ask("val-1")) is not None:
        await house.submit("val-1", lease)
        await house.score()


def test_held_out_scores_come_with_pass_at_k_and_their_bands(site, look) -> None:
    page = look("/", viewport={"width": 1200, "height": 900})
    page.wait_for_selector("#link.up")
    box = page.locator('[data-curve="heldout"]')
    assert (box.get_attribute("data-count"), page.locator(".key.also").inner_text()) == ("0", "pass@2")
    site.play(evaluated)
    while len(json.loads(page.get_attribute("#curves", "data-points") or "")["passk"]) < 2:
        page.wait_for_timeout(50)
    assert box.get_attribute("data-count") == "2"
    assert box.locator(".u-legend th").all_inner_texts() == ["step", "pass@1", "from", "to", "pass@2", "from", "to"]
    bare = look("/", java_script_enabled=False)
    assert bare.locator('[data-curve="heldout"] polygon').count() == 2
    assert bare.locator('[data-curve="heldout"] circle').count() == 4


def test_the_nodes_table_is_live(site, look) -> None:
    page = look("/?sort=name&order=up")
    page.wait_for_selector("#link.up")

    async def joined(house) -> None:
        await house.client("zoe")
        house.clock.now += 4

    site.play(joined)
    page.wait_for_selector("#nodes >> text=zoe")
    assert page.locator("#nodes th[aria-sort=ascending]").inner_text().startswith("name"), "it stays sorted as it was"


def test_a_story_opens_and_leads_on(site, look) -> None:
    page = look("/")
    page.click("#nodes >> text=mallory")
    page.wait_for_url(f"{site.url}/story/{site.house.named('mallory').id}")
    assert "ejected" in page.inner_text(".facts")
    assert "evidence" in page.inner_text("main")
    page.click("table a.id >> nth=0")
    page.wait_for_url(re.compile(rf"{site.url}/story/a[0-9a-f]{{12}}"))  # the audit that led to the verdict
    page.click("article a.id >> nth=0")
    page.wait_for_url(re.compile(rf"{site.url}/story/r[0-9a-f]{{12}}"))  # one of its rollouts
    assert "leased" in page.locator("main table").last.inner_text()


def test_search_finds_a_node_by_its_name(site, look) -> None:
    page = look("/ledger")
    page.fill(".find input", "ada")
    page.press(".find input", "Enter")
    page.wait_for_url(f"{site.url}/story/{site.house.named('ada').id}")


def test_sorting(site, look) -> None:
    page = look("/")
    names = "[...document.querySelectorAll('#nodes tbody tr td:first-child')].map(cell => cell.innerText)"
    page.click("#nodes th >> text=residual")
    page.wait_for_selector("th[aria-sort=descending] >> text=residual")
    assert page.evaluate(names)[0] == "mallory", "the most evidence comes first"
    page.click("#nodes th >> text=name")
    page.wait_for_selector("th[aria-sort=ascending] >> text=name")
    found = page.evaluate(names)
    assert found == sorted(found)
    page.click("#nodes th >> text=name")
    page.wait_for_selector("th[aria-sort=descending] >> text=name")
    assert page.evaluate(names) == found[::-1]


def test_the_evidence_is_coloured(site, look) -> None:
    page = look("/")
    rows = page.locator("#nodes tbody tr")
    assert rows.filter(has_text="mallory").locator(".shade-6").count() == 1
    assert rows.filter(has_text="ada").locator(".shade-0").count() == 1
    assert "ejected" in rows.filter(has_text="mallory").inner_text()


def test_nothing_sticks_out_of_a_narrow_page(site, look) -> None:
    rollout = site.house.rows(sa.select(ROLLOUTS.c.rollout))[0][0]
    node = site.house.named("mallory").id
    for path in (*PATHS, f"/story/{node}", f"/story/{rollout}", "/story/test-step-1", "/story/test"):
        page = look(path, viewport={"width": 360, "height": 740})
        page.wait_for_timeout(100)
        for scheme in ("dark", "light"):
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate("document.documentElement.scrollWidth") <= 360, (path, scheme)
        page.close()


def test_hostile_text_is_inert(site, look) -> None:
    with site.house.ctx.database.engine.begin() as connection:
        connection.execute(NODES.update().values(name=HOSTILE, hardware='{"cpu": "<b>x</b>"}', phase=HOSTILE))
        connection.execute(ROLLOUTS.update().values(answer=HOSTILE, parts='{"<i>": 1.0}'))
        connection.execute(TASKS.update().values(prompt=HOSTILE))
    node = site.house.named("ada").id
    rollout = site.house.rows(sa.select(ROLLOUTS.c.rollout))[0][0]
    for path in (*PATHS, f"/story/{node}", f"/story/{rollout}"):
        page = look(path)
        page.wait_for_timeout(300)
        assert page.evaluate("window.pwned === undefined"), path
        assert page.locator("main img").count() == 0, path
        assert page.locator("script:not([src])").count() == 0, path
        if path != "/weights":
            assert "<img src=x onerror=window.pwned=1>" in page.inner_text("main"), path
        assert "\u202e" not in page.content(), path
        page.close()


def test_the_page_reads_without_scripts(site, look) -> None:
    page = look("/", java_script_enabled=False)
    text = page.inner_text("main")
    assert "step 1 of 9" in text
    assert "held-out" in text
    assert page.locator('[data-curve="reward"] svg polyline').count() == 1
    page.click("#nodes th >> text=residual")
    page.wait_for_url("**sort=residual**")
    assert page.locator("#nodes tbody tr >> nth=0").inner_text().startswith("mallory")
    page.click("nav >> text=rollouts")
    page.wait_for_url("**/rollouts")
    assert page.locator("article").count() > 4
    page.click("article a.id >> nth=0")
    page.wait_for_url("**/story/**")
    assert "Events" in page.inner_text("main")


def test_the_theme_follows_the_system_and_the_toggle(site, look) -> None:
    page = look("/", color_scheme="dark")
    back = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(back)
    page.click("#theme")
    light = page.evaluate(back)
    assert dark != light
    page.reload()
    assert page.evaluate(back) == light, "the choice is remembered"


def test_an_id_that_is_code_is_shown_as_text(site, look) -> None:
    page = look("/ledger")
    page.on("console", lambda said: None)
    page.goto(f"{site.url}/story?id=%3Cimg%20src%3Dx%20onerror%3Dwindow.pwned%3D1%3E")
    assert "<img src=x" in page.inner_text("main")
    assert page.evaluate("window.pwned === undefined")
    look.forgive("404")


def test_a_viewer_is_told_when_the_coordinator_is_gone(site, look) -> None:
    page = look("/")
    page.wait_for_selector("#link.up")
    site.close()
    page.wait_for_selector("#link:not(.up) >> text=no answer")
    look.forgive("ERR_")
    look.forgive("[object Event]")
