"""Files that are wrong, as ``benchmarks.faults`` makes them, but fewer."""

from __future__ import annotations

from benchmarks.faults import run


def test_what_is_wrong_with_a_file_is_told_and_never_taken_for_right() -> None:
    faults, grown = run({"artifacts": 600, "records": 200, "states": 400})
    assert not faults.found
    refused = sum(n for (_, outcome), n in faults.counts.items() if outcome == "refused")
    assert refused > 0.6 * faults.counts.total()
    assert grown < 256 << 20
