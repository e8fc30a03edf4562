"""A run in a terminal: a live view where there is one, else a line now and then."""

import time
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from farflung.config import Config
from farflung.launch.examples import Pair, five_answers
from farflung.launch.logs import alike
from farflung.launch.terminal import Terminal
from farflung.protocol.messages import EvalView, NodeView, Status
from farflung.protocol.shown import visible

LINE_EVERY_S = 10.0
BARS = "▁▂▃▄▅▆▇█"
NOTES = 5
WARNING_CHARS = 400
COLOURS = {"trusted": "green", "probation": "yellow", "quarantined": "red", "ejected": "bold red"}


class Screen:
    """A context manager that shows statuses as they come and the summary at the end."""

    def __init__(self, config: Config, *, is_plain: bool, since: float, concludes: bool = True) -> None:
        """`since` is the monotonic time of the command. It `concludes` unless the caller sums up what came of it."""
        self.config, self.is_plain, self._concludes = config, is_plain, concludes
        self.console = Terminal()
        self._live = None if is_plain else Live(console=self.console, refresh_per_second=4, transient=False)
        self._notes: list[str] = []
        self._since = since
        self._lined_at = 0.0
        self._told: set[str] = set()
        self._warning, self._like_it = "", Counter[str]()
        """The last warning or error, and how often there was one like it."""
        self._is_warned = False
        """Whether there was one like an earlier one since the last line."""

    def __enter__(self) -> "Screen":
        self.console.print(f"farflung · run {self.config.run.name} · starting in {self.config.folder}")
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def note(self, text: str) -> None:
        """Something that happened, worth a line."""
        stamped = f"{time.monotonic() - self._since:6.1f} s  {text}"
        self._notes.append(stamped)
        if self.is_plain:
            self.console.print(stamped, soft_wrap=True)

    def say(self, text: str) -> None:
        """Something to be read after the live view is over."""
        self.console.print(text, soft_wrap=True)

    def warn(self, role: str, text: str) -> None:
        """A warning or an error: the last one stays in view; of those that are alike but for numbers one is noted."""
        self._warning, kind = f"{role}: {text}"[:WARNING_CHARS], alike(text)
        self._like_it[kind] += 1
        if self._like_it[kind] == 1:
            self.note(self._warning)
        else:
            self._warning += f" (one of {self._like_it[kind]} like it)"
            self._is_warned = True

    def show(self, status: Status) -> None:
        """The run as it stands."""
        self._tell_verdicts(status)
        self._tell_warnings(status)
        if self._live is not None:
            notes = Text("\n".join(self._notes[-NOTES:]))
            warning = [Text(self._warning, style="yellow")] if self._warning else []
            panel = run_panel(status, time.monotonic() - self._since)
            self._live.update(Group(panel, nodes_table(status, self.console.width), *warning, notes))
        elif time.monotonic() - self._lined_at >= LINE_EVERY_S:
            self._lined_at = time.monotonic()
            self.note(one_line(status) + (f" · {self._warning}" if self._is_warned else ""))
            self._is_warned = False

    def _tell_verdicts(self, status: Status) -> None:
        names = {node.node: node.name for node in status.nodes}
        for verdict in status.verdicts:
            if verdict.audit not in self._told:
                self._told.add(verdict.audit)
                outcome = "ejected" if verdict.outcome == "eject" else "had a submission voided"
                self.note(f"{names.get(verdict.node, verdict.node)} {outcome}: {verdict.reason}")

    def _tell_warnings(self, status: Status) -> None:
        for warning in status.warnings:
            if warning not in self._told:
                self._told.add(warning)
                self.note(warning)

    async def conclude(self, summary: dict[str, Any], folder: Path) -> None:
        """Show the answers and the summary."""
        if not self._concludes:
            return
        print_answers(self.console, await five_answers(folder))
        print_summary(self.console, summary, folder)


def one_line(status: Status) -> str:
    """A status in one line, for logs."""
    reward = f"{status.steps[-1].reward:.2f}" if status.steps else "–"
    online = sum(node.is_online for node in status.nodes)
    return (
        f"step {max(status.latest.step, 0)}/{status.steps_total} reward {reward} accepted {status.accepted} rollouts "
        f"({status.accepted_tokens} tokens) nodes {online} audits {status.audits.get('done', 0)} "
        f"re-issued {status.leases_reissued} · {status.status}{_awaited(status)}"
    )


def _awaited(status: Status) -> str:
    """In words, the thing awaited by a run that has accepted nothing yet."""
    if status.accepted or status.status != "running":
        return ""
    phase = next((node.phase or "starting up" for node in status.nodes if node.role == "trainer"), "on its way")
    if status.latest.step < 0:
        return f", waits for the first weights: the trainer is {phase}"
    return ", waits for the first rollouts that are replayed and scored"


def _held_out(view: EvalView) -> str:
    chance = "" if view.pass_k is None else f", pass@{view.k} {view.pass_k:.3f}"
    return f"step {view.step}: {view.score:.3f} ({view.tasks}){chance}"


def run_panel(status: Status, elapsed_s: float | None = None) -> Panel:
    """Header: where the run stands, and since when: by a clock of our own where one was running."""
    since_s = max(0.0, status.now - status.started_at) if elapsed_s is None else elapsed_s
    grid = Table.grid(padding=(0, 3))
    rewards = [step.reward for step in status.steps]
    first = f"{rewards[0]:.2f}" if rewards else "–"
    now = f"{rewards[-1]:.2f}" if rewards else "–"
    evals = "  ".join(_held_out(e) for e in status.evals) or "–"
    bar = ProgressBar(total=max(1, status.steps_total), completed=max(0, status.latest.step), width=40)
    grid.add_row("step", bar, f"{max(0, status.latest.step)}/{status.steps_total}  {status.status}")
    grid.add_row("reward", Text(spark(rewards), style="cyan"), f"{first} → {now}")
    grid.add_row("held-out", evals, "")
    grid.add_row(
        "accepted",
        f"{status.accepted:,} rollouts, {status.accepted_tokens:,} tokens",
        f"audits {status.audits.get('done', 0)}  re-issued leases {status.leases_reissued}",
    )
    title = f"farflung · {status.run} · {Path(status.model).name} · {status.env} · {since_s:.0f} s"
    return Panel(grid, title=Text(visible(title)), title_align="left", border_style="cyan")


def spark(values: list[float]) -> str:
    """Values in [0, 1] as a row of bars."""
    return "".join(BARS[min(len(BARS) - 1, int(value * len(BARS)))] for value in values[-60:])


def nodes_table(status: Status, width: int) -> Table:
    """The nodes that are here and how they do; a narrow terminal gets fewer columns rather than cut ones."""
    table = Table(box=None, header_style="dim", padding=(0, 2 if width >= WIDE else 1, 0, 0))
    rows = [_node_cells(node) for node in status.nodes]
    spared = () if width >= WIDEST else ("machine",) if width >= WIDE else SPARED
    shown = [name for name in COLUMNS if name not in spared]
    for name in shown:
        table.add_column(name, justify="right" if name in NUMBERS else "left", no_wrap=True)
    for node, cells in zip(status.nodes, rows, strict=True):
        table.add_row(*(cells[name] for name in shown), style="" if node.is_online else "dim")
    return table


COLUMNS = ("node", "role", "status", "step", "phase", "tok/s", "accepted", "rejected", "audits", "credit", "machine")
NUMBERS = ("step", "tok/s", "accepted", "rejected", "audits", "credit")
SPARED = ("role", "tok/s", "audits", "machine")
WIDE, WIDEST = 100, 180


def _node_cells(node: NodeView) -> dict[str, str | Text]:
    is_worker = node.role == "worker"
    is_silent = not node.is_online and node.phase != "gone"
    phase = f"silent for {node.seen_s_ago:.0f} s" if is_silent else node.phase
    granted = "untrusted" if node.role == "relay" else "granted"
    return {
        "node": node.name,
        "role": node.role,
        "status": Text(node.status, style=COLOURS.get(node.status, "")) if is_worker else granted,
        "step": str(node.loaded_step) if node.loaded_step >= 0 else "–",
        "phase": "ejected" if node.status == "ejected" else phase,
        "tok/s": f"{node.tokens_per_s:,.0f}" if node.tokens_per_s else "",
        "accepted": f"{node.accepted:,}" if is_worker else "",
        "rejected": f"{node.rejected:,}" if is_worker else "",
        "audits": str(node.audits) if is_worker else "",
        "credit": f"{node.credit + node.escrow:,}" if is_worker else "",
        "machine": node.hardware,
    }


def print_answers(console: Console, rows: list[Pair]) -> None:
    """Five held-out questions, answered before and after."""
    if not rows:
        return
    table = Table(
        title="Five held-out questions, before and after", title_justify="left", box=None, padding=(0, 3, 0, 0)
    )
    for name in ("question", "before", "", "after", ""):
        table.add_column(name)
    for row in rows:
        table.add_row(row.prompt, row.before, mark(row.before_reward), row.after, mark(row.after_reward))
    console.print()
    console.print(table)


def mark(reward: float) -> Text:
    """Right or wrong at a glance."""
    return Text("✓", style="green") if reward >= 0.5 else Text("✗", style="red")


def print_summary(console: Console, s: dict[str, Any], folder: Path) -> None:
    """The figures that matter most, in words."""
    console.print()
    if s["eval_before"] is not None and s["eval_after"] is not None:
        low, high = s["eval_after_interval"]
        after = f" (95 %: {low:.3f} to {high:.3f}) on {s['eval_tasks']} tasks, after {s['steps']} steps"
        gain = (f"held-out score {s['eval_before']:.3f} → ", (f"{s['eval_after']:.3f}", "bold green"))
        console.print(Text.assemble(*gain, f"{after} in {s['wall_s']:.0f} s"))
    if s["pass_k_before"] is not None and s["pass_k_after"] is not None:
        console.print(f"held-out pass@{s['pass_k']} {s['pass_k_before']:.3f} → {s['pass_k_after']:.3f}")
    for node in s["nodes_ejected"]:
        caught = f" ({node['true_role']}) after {node['submissions_until_caught']} submissions: {node['reason']}"
        console.print(Text.assemble("ejected ", (node["name"], "bold red"), caught), soft_wrap=True)
    console.print(f"honest nodes ejected: {s['honest_ejected']}; leases re-issued to others: {s['leases_reissued']}")
    share = s["verification_overhead"]
    steady = s["verification_overhead_steady"]
    if share is not None:
        later = f", {steady:.1%} once every node had earned trust" if steady is not None else ""
        console.print(
            f"verification: {s['audits']} audits of {s['audited_fraction']:.1%} of the rollouts, "
            f"{share:.1%} of the CPU time of generation{later}"
        )
    if s["usd_per_million_verified_tokens"] is not None:
        console.print(
            f"cost at the configured prices: {s['cost_usd']:.4f} USD, "
            f"{s['usd_per_million_verified_tokens']:.2f} USD per million verified tokens"
        )
    console.print(f"figures in {folder / 'summary.json'}, everything else beside it", soft_wrap=True)
