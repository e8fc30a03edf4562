"""Draw a run's reward by step, its mean of five, and its held-out scores with their intervals, as an SVG.

python scripts/draw_curve.py runs/smollm2-sums docs/images/smollm2-sums.svg
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 640, 320, 45, 30, 620, 280
WINDOW = 5


def rows(run: Path) -> list[dict[str, Any]]:
    """What the run has written about itself."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]


def draw(found: list[dict[str, Any]]) -> str:
    """The picture."""
    steps = [row for row in found if row["kind"] == "step" and "reward" in row]
    scores = [row for row in found if row["kind"] == "eval"]
    last = max(row["step"] for row in (*steps, *scores))

    def place(step: float, value: float) -> str:
        return f"{LEFT + (RIGHT - LEFT) * step / last:.1f},{BOTTOM - (BOTTOM - TOP) * value:.1f}"

    rewards = [row["reward"] for row in steps]
    means = [statistics.fmean(rewards[max(0, k - WINDOW + 1) : k + 1]) for k in range(len(rewards))]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"',
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for level in (0.0, 0.25, 0.5, 0.75, 1.0):
        low, high = place(0, level), place(last, level)
        y = low.split(",")[1]
        parts.append(f'<polyline points="{low} {high}" stroke="#ddd"/><text x="8" y="{float(y) + 4}">{level:g}</text>')
    dots = (place(row["step"], row["reward"]).split(",") for row in steps)
    parts += [f'<circle cx="{x}" cy="{y}" r="2" fill="#99c1c9"/>' for x, y in dots]
    line = " ".join(place(row["step"], mean) for row, mean in zip(steps, means, strict=True))
    parts.append(f'<polyline points="{line}" fill="none" stroke="#0b7285" stroke-width="2"/>')
    for row in scores:
        low, high = place(row["step"], row["low"]), place(row["step"], row["high"])
        x, y = place(row["step"], row["score"]).split(",")
        parts.append(
            f'<polyline points="{low} {high}" stroke="#c92a2a"/><circle cx="{x}" cy="{y}" r="4" fill="#c92a2a"/>'
        )
    parts.append(f'<text x="{LEFT}" y="18" fill="#0b7285">reward of sampled rollouts, mean of five steps</text>')
    parts.append('<text x="350" y="18" fill="#c92a2a">held out, greedy, 95 %</text>')
    parts.append(f'<text x="{(LEFT + RIGHT) / 2 - 30}" y="{HEIGHT - 10}">steps, up to {last}</text>')
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    """Draw one run."""
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("run", type=Path, help="the run's folder")
    made.add_argument("picture", type=Path, help="where the SVG goes")
    asked = made.parse_args()
    asked.picture.write_text(draw(rows(asked.run)))


if __name__ == "__main__":
    main()
