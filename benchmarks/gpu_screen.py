"""The results of `gpu.sh` on one screen, with their targets."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

TARGET_MFU = 0.5
"""of the compiled training step"""
TARGET_FRACTION = 0.8
"""speed of the harvest as a fraction of the forward pass"""
GIB = 2**30


def all_is_well(results: dict[str, Any]) -> bool:
    """Return whether every part finished, no figure is an error, and the device agrees with the CPU."""
    return all(
        part["status"] == "finished"
        and not any(
            isinstance(v, dict) and ("error" in v and isinstance(v["error"], str))
            for v in part["figures"].values()
        )
        for part in results["parts"].values()
    ) and not _disagreeing(results["parts"].get("parity", {"figures": {}})["figures"])


def screen(results: dict[str, Any], out: Path) -> str:
    """Return the lines of the screen."""
    parts = results["parts"]
    machine = parts["machine"]["figures"]
    versions = machine.get("versions", {})
    driver = f", driver {machine['driver']}" if machine.get("driver") else ""
    lines = [
        f"cratelm {machine.get('commit', '')[:12]} on {machine.get('card', 'an unknown device')}{driver},"
        f" torch {versions.get('torch')}, transformers {versions.get('transformers')}"
    ]
    if results["options"]["tiny"] == "True":
        lines.append("tiny models: the figures below mean nothing")
    writers = {"parity": _parity, "training": _training, "harvest": _harvest, "twins": _twins}
    for name, part in parts.items():
        if name in writers:
            lines += [f"{name}, {part['seconds']:.0f} s"]
            lines += [f"  {line}" for line in writers[name](part["figures"])]
        if part["status"] != "finished":
            lines.append(f"  FAILED: the part {name} {part['status']}"[:200])
    files = [p for p in sorted(out.rglob("*")) if p.is_file()]
    size = sum(p.stat().st_size for p in files)
    lines.append(
        f"{results['seconds']:.0f} s in all; {len(files)} files, {size / 1e6:.1f} MB, in {out}"
    )
    return "\n".join(lines)


def _disagreeing(figures: dict[str, Any]) -> list[str]:
    return [name for name, record in figures.items() if not record.get("agrees")]


def _parity(figures: dict[str, Any]) -> Iterator[str]:
    for precision in ("fp32", "bf16"):
        records = [r for name, r in figures.items() if name.endswith(precision)]
        if records:
            limits = records[0]["limits"]
            yield (
                f"{precision}: {len(records)} models, largest error of the loss"
                f" {max(r['loss_error'] for r in records):.1e} (limit {limits['loss']:.0e}), of the gradients"
                f" {max(r['gradient_error'] for r in records):.1e} (limit {limits['gradients']:.0e})"
            )
    wrong = _disagreeing(figures)
    yield (
        f"DISAGREES WITH THE CPU: {', '.join(wrong)}"
        if wrong
        else f"all {len(figures)} comparisons agree"
    )
    loss = figures.get("chunked loss against plain")
    if loss and not loss["torch_has_the_chunked_form"]:
        yield "this torch has no chunked loss: the plain form was used"


def _training(figures: dict[str, Any]) -> Iterator[str]:
    if "matrix_tflops" in figures:
        yield (
            f"matrix products in bf16: {figures['matrix_tflops']:.3g} TFLOP/s; V {figures.get('vocab', 0):,},"
            f" T {figures.get('length', 0):,}"
        )
    for name, record in figures.items():
        if not isinstance(record, dict):
            continue
        if "error" in record:
            yield f"{name:<36} FAILED: {record['error']}"[:150]
        elif "mfu" in record:
            memory = record["peak_bytes"]
            peak = f", {memory / GIB:.1f} GiB" if memory else ""
            yield (
                f"{name:<36}{record['tokens_per_s']:>12,.0f} tokens/s, MFU {record['mfu']:.3f}"
                f"{_against(record['mfu'], TARGET_MFU) if name.endswith('l, compiled') else ''}, batch {record['batch']}{peak}"
            )
        else:
            memory = record["memory_of_five_to_four"]
            ratio = f"; five take {memory:.2f} times the memory" if memory else ""
            yield f"{name:<36}{record['times_as_fast_as_five']:>12.2f} times as fast as five{ratio}"


def _against(value: float, target: float) -> str:
    return f" (target {target}: {'met' if value >= target else 'missed'})"


def _harvest(figures: dict[str, Any]) -> Iterator[str]:
    for how in ("eager", "compiled"):
        record = figures.get(how)
        if record and "error" in record:
            yield f"{how:<10}FAILED: {record['error']}"[:150]
        elif record:
            yield (
                f"{figures['model']} {how:<9}forward {record['forward_tokens_per_s']:,.0f} tokens/s, harvest"
                f" {record['harvest_tokens_per_s']:,.0f}: {record['fraction']:.2f}"
                f"{_against(record['fraction'], TARGET_FRACTION)}, last third {record['fraction_of_last_third']:.2f}"
            )


def _twins(figures: dict[str, Any]) -> Iterator[str]:
    tokens = figures.get("tokens")
    if tokens:
        yield (
            f"{tokens['kind']} tokens: {tokens['train_tokens']:,}, vocabulary {int(tokens['rows']):,}"
            + (
                ""
                if tokens["kind"] == "carried"
                else " (made up: their losses say nothing about text)"
            )
        )
    for name, record in figures.items():
        if name == "tokens":
            continue
        if "error" in record:
            yield f"{name:<9} FAILED: {record['error']}"[:150]
        else:
            files = "" if record["files"] else "; weights not written: no room left"
            yield (
                f"{name:<9} {record['steps']:,} steps, {record['tokens'] / 1e6:.1f}M tokens, {record['seconds']:.0f} s:"
                f" validation {record['validation_loss']:.3f} ± {record['validation_standard_error']:.3f}{files}"
            )
