"""Writes the generated parts of README.md and docs/attacks.md, and docs/benchmarks.md with its pictures, from the
operator table and from the newest files in benchmarks/results.

``python benchmarks/report.py`` rewrites them; with ``--check`` it fails if the texts are not what the files say.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import bench_report

from fairkernels.app.report import HEADINGS, number
from fairkernels.ops.schema import OPERATORS

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
ATTACKS = ROOT / "docs" / "attacks.md"
BENCHMARKS = ROOT / "docs" / "benchmarks.md"
IMAGES = ROOT / "docs" / "images"
RESULTS = ROOT / "benchmarks" / "results"
BENCH_FILES = "*-cores-*.json"


def newest(pattern: str) -> dict[str, Any] | None:
    """The newest result of its kind, if there is one; names end with the date. No partial run may lie there."""
    files = sorted(RESULTS.glob(pattern), key=lambda path: path.stem[-len("2026-11-20") :])
    contents = [whole(path) for path in files]
    return contents[-1] if contents else None


def whole(path: Path) -> dict[str, Any]:
    """The content of a file, which must be a run of everything: nothing else may stand for it in the texts."""
    content = json.loads(path.read_text())
    if content.get("partial"):
        sys.exit(f"{path.name}: a partial run ({'; '.join(content['partial'])}) is not reported, move it elsewhere")
    return content


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def demo() -> str:
    result = newest("demo-*.json")
    methods = result["test"]
    rows = []
    for metric, heading in HEADINGS.items():
        unit = "" if metric == "symmetry_gap" else ", %"
        cells = [number(metric, found["mean"][metric], found["std"][metric]) for found in methods.values()]
        rows.append([heading + unit, *cells])
    settings, machine = result["settings"], result["machine"]
    seeds = len(next(iter(methods.values()))["seeds"])
    caption = (
        f"{result['images']['test']} test images of scikit-learn's digits under PGD-{settings['test_steps']}, "
        f"l∞ radius {settings['radius']:g}; mean ± standard deviation over {seeds} seeds. λ was chosen on the "
        f"validation images. With the control's errors made perfectly symmetric, chance alone would leave a symmetry "
        f"gap of {result['symmetry_floor']:.2f} on so few images. "
        f"{result['seconds']:.0f} s on {machine['cores']} cores ({machine['processor']}, torch {machine['torch']})."
    )
    return f"{table(['', *methods], rows)}\n\n{caption}"


def speed() -> str:
    result = newest("demo-*.json")
    times = result["speed"]
    shapes = list(dict.fromkeys((time["batch"], time["classes"]) for time in times))
    names = list(dict.fromkeys(time["name"] for time in times))
    found = {(time["name"], time["batch"], time["classes"]): time["microseconds"] for time in times}
    rows = []
    for name in names:
        cells = []
        for shape in shapes:
            own, ours = found[(name, *shape)], found[(names[0], *shape)]
            ratio = own / ours
            cells.append(f"{own:,.0f} µs ({ratio:,.2f} ×)" if ratio < 10 else f"{own:,.0f} µs ({ratio:,.0f} ×)")
        rows.append([name, *cells])
    machine = result["machine"]
    caption = f"Median, float32, one thread, {machine['processor']}, torch {machine['torch']}."
    return f"{table(['', *(f'B={batch}, K={classes}' for batch, classes in shapes)], rows)}\n\n{caption}"


def support() -> str:
    def mark(yes: bool) -> str:
        return "yes" if yes else "–"

    rows = [
        [f"`{name}`", "yes", *(mark(b in o.kernels) for b in ("native", "triton")), "2" if o.differentiable else "–"]
        for name, o in OPERATORS.items()
    ]
    return table(["operator", "reference", "native CPU", "Triton", "derivatives"], rows)


def bench() -> str:
    content = newest(BENCH_FILES)
    return bench_report.readme_part(content) if content else "No run is committed yet."


def attacks() -> str:
    """A table for every machine, from its newest file."""
    machines = {path.stem[: -len("-2026-11-20")] for path in RESULTS.glob("attacks-*.json")}
    contents = [content for name in sorted(machines) if (content := newest(f"{name}-????-??-??.json"))]
    return "\n\n".join(map(shares, contents)) or "No run is committed yet."


def shares(content: dict[str, Any]) -> str:
    found = {(one["model"], one["batch"], one["library"]): one for one in content["shares"]}
    libraries = list(dict.fromkeys(library for _, _, library in found))
    rows = []
    for model, batch in dict.fromkeys((model, batch) for model, batch, _ in found):
        here = {library: found.get((model, batch, library)) for library in libraries}
        passes = min(one["passes"] for one in here.values() if one)
        rows.append([model, str(batch), f"{1e3 * passes:,.1f}", *map(share, here.values())])
    machine, what = content["machine"], content["what"]
    rounds = sorted({one["rounds"] for one in content["shares"]})
    caption = (
        f"{what[0].upper()}{what[1:]}: the time outside the model and autograd during the attack. In brackets "
        f"one minus ten bare passes beside it, median and quartiles of {rounds[0]} to {rounds[-1]} rounds: below 0 the "
        f"passes alone were slower, by chance. {machine['gpu'] or machine['processor']}, "
        f"{machine['threads']} threads, torch {machine['torch']}."
    )
    return f"{table(['model', 'B', '10 passes, ms', *libraries], rows)}\n\n{caption}"


def share(one: dict[str, Any] | None) -> str:
    if one is None:
        return "–"
    outside = "–" if one["outside"] is None else f"{one['outside']:.2%}"
    quartiles = "; {:.1%} … {:.1%}".format(*one["quartiles"]) if one["rounds"] > 1 else ""
    return f"{outside} ({one['share']:.1%}{quartiles})"


PARTS = {
    README: {"demo": demo, "speed": speed, "support": support, "bench": bench},
    ATTACKS: {"attacks": attacks},
}


def filled(path: Path) -> str:
    text = path.read_text()
    for name, part in PARTS[path].items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"{path.name} has no place for {name}: <!-- {name} --> ... <!-- /{name} -->")
        content = part()
        text = pattern.sub(lambda found, content=content: f"{found[1]}{content}\n{found[2]}", text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    content = newest(BENCH_FILES)
    document = bench_report.document(content) if content else "# Benchmarks\n\nNo run is committed yet.\n"
    expected = {**{path: filled(path) for path in PARTS}, BENCHMARKS: document}
    if not check:
        for path, text in expected.items():
            path.write_text(text)
        if content:
            bench_report.draw_roofline(content, IMAGES / "roofline.png")
            bench_report.draw_scaling(content, IMAGES / "scaling.png")
        return
    stale = [
        str(path.relative_to(ROOT)) for path, text in expected.items() if not path.exists() or path.read_text() != text
    ]
    if stale:
        sys.exit(f"{' and '.join(stale)}: not what benchmarks/results says, run python benchmarks/report.py")


if __name__ == "__main__":
    main()
