"""Size of each extra: the installed files of the packages that it brings beyond the library's own dependencies.

    python benchmarks/extras.py

Run it in an environment that has all extras; a package that is absent counts nothing. Bytecode does not count, since
not every installer writes it. Writes benchmarks/results/extras.md.
"""

import importlib.metadata as metadata
import platform
from pathlib import Path

from packaging.requirements import Requirement

LEFT_OUT = ("dev", "docs", "bench", "bench-jax")  # for developers


def needed(package: str, extras: frozenset[str], found: set[str]) -> None:
    """Add the packages that a package needs with these extras, itself included."""
    key = package.lower().replace("_", "-")
    if key in found and not extras:
        return
    found.add(key)
    try:
        requirements = metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return
    for text in requirements:
        requirement = Requirement(text)
        names = ("", *extras)
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in names):
            if requirement.name == "counterflow":
                needed("counterflow", frozenset(requirement.extras), found)
            elif requirement.name.lower().replace("_", "-") not in found:
                needed(requirement.name, frozenset(requirement.extras), found)


def megabytes(packages: set[str]) -> float:
    """Return the size of the installed files without bytecode."""
    total = 0
    for package in packages - {"counterflow"}:
        try:
            files = metadata.files(package) or []
        except metadata.PackageNotFoundError:
            continue
        paths = [Path(str(file.locate())) for file in files if file.suffix != ".pyc"]
        total += sum(path.stat().st_size for path in paths if path.is_file())
    return total / 1e6


def main() -> None:
    base: set[str] = set()
    needed("counterflow", frozenset(), base)
    rows = [f"| (none) | {megabytes(base):,.0f} | {len(base) - 1} packages |"]
    for extra in metadata.metadata("counterflow").get_all("Provides-Extra") or ():
        if extra in LEFT_OUT:
            continue
        found: set[str] = set()
        needed("counterflow", frozenset([extra]), found)
        new = found - base
        named = ", ".join(sorted(new, key=lambda name: -megabytes({name}))[:4])
        rows.append(f"| `{extra}` | {megabytes(new):,.0f} | {len(new)} packages; the largest: {named} |")
    system = f"{platform.system()} {platform.machine()}"
    versions = f"Python {platform.python_version()}, torch {metadata.version('torch')}, {system}"
    page = Path(__file__).parent / "results" / "extras.md"
    page.write_text(
        f"# Installed size of the extras\n\nMade by `python benchmarks/extras.py` on {versions}.\n"
        "Files without bytecode.\n\n"
        "| extra | MB | brings, beyond the library |\n|---|---|---|\n" + "\n".join(rows) + "\n",
        encoding="utf-8",
    )
    print(page.read_text("utf-8"))


if __name__ == "__main__":
    main()
