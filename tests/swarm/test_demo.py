"""The demo with real processes: reward rises, the cheat is caught, a machine dies and the run does not care."""

import json
import sqlite3

import pytest

from farflung.launch.summary import summarise
from farflung.ops.export import export
from farflung.protocol.errors import ConfigError

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(300)]


def test_reward_rises_on_held_out_tasks(demo):
    summary = demo.summary()
    assert summary["eval_tasks"] == 128
    assert summary["eval_after"] - summary["eval_before"] >= 0.30
    assert summary["reward_last"] > summary["reward_first"]


def test_the_cheat_alone_is_ejected_with_a_reason(demo):
    summary = demo.summary()
    assert [node["name"] for node in summary["nodes_ejected"]] == ["mallory"]
    assert summary["nodes_ejected"][0]["true_role"] == "unseeded"
    assert "not what the seeds give" in summary["nodes_ejected"][0]["reason"]
    assert summary["honest_ejected"] == 0


def test_nothing_of_the_cheat_was_trained(demo):
    """Where the policy is certain, its own noise picks what the seeds pick: such text passed its replay."""
    with sqlite3.connect(demo.folder / "farflung.db") as database:
        query = """SELECT count(*) FROM rollouts JOIN nodes USING (node) WHERE name = 'mallory'
                   AND rollouts.status IN ('accepted', 'batched', 'trained') AND NOT rollouts.is_audited"""
        assert database.execute(query).fetchone() == (0,)
    database.close()


def test_the_lease_of_the_dead_worker_went_to_others(demo):
    assert demo.summary()["leases_reissued"] >= 1


def test_the_ledger_sums_to_zero_and_the_cheat_has_nothing_but_for_what_passed_its_replay(demo):
    with sqlite3.connect(demo.folder / "farflung.db") as database:
        assert database.execute("SELECT sum(tokens) FROM entries").fetchone() == (0,)
        mallory = database.execute("SELECT node FROM nodes WHERE name = 'mallory'").fetchone()[0]
        accounts = (f"escrow:{mallory}", f"credit:{mallory}")
        query = "SELECT coalesce(sum(tokens), 0) FROM entries WHERE account IN (?, ?)"
        paid = database.execute(query, accounts).fetchone()[0]
        query = """SELECT coalesce(sum(tokens), 0) FROM rollouts
                   WHERE node = ? AND is_audited AND status NOT IN ('held', 'rejected', 'void')"""
        assert 0 <= paid <= database.execute(query, (mallory,)).fetchone()[0]
    database.close()


def test_every_figure_of_the_contract_is_there_and_recomputes_to_the_same(demo):
    written = demo.summary()
    assert summarise(demo.folder) == written
    assert json.loads((demo.folder / "config.json").read_text())["run"]["steps"] == 10
    unmeasured = {name for name, value in written.items() if value is None} - {"verification_overhead_steady"}
    assert unmeasured == set()


def test_weights_travel_and_swapping_them_takes_no_time(demo):
    summary = demo.summary()
    assert 0 < summary["weights_sent_bytes_per_step"] < 20 * summary["weights_full_bytes"], "for ten nodes"
    assert 0 < summary["sync_pause_s"] < 2


def test_the_first_reward_comes_soon(demo):
    assert 0 < demo.summary()["first_reward_s"] < 60


def test_the_end_shows_answers_before_and_after(demo):
    assert "Five held-out questions, before and after" in demo.output
    assert "killed doomed-1" in demo.output


def test_the_policy_can_be_exported_and_loaded_without_farflung(demo, tmp_path):
    from transformers import AutoModelForCausalLM

    out = tmp_path / "model"
    assert export(demo.folder, out) == demo.summary()["steps"]
    card = (out / "README.md").read_text()
    assert f"{demo.summary()['eval_after']:.3f} greedily on 128 tasks (95 %: " in card
    assert "base_model: base" in card
    model = AutoModelForCausalLM.from_pretrained(out)
    assert {str(parameter.dtype) for parameter in model.parameters()} == {"torch.bfloat16"}
    with pytest.raises(ConfigError, match="exists already"):
        export(demo.folder, out)
