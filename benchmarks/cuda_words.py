"""What the CUDA check found (`benchmarks.cuda`), as tables and sentences for the pages."""

from collections.abc import Iterator
from typing import Any

from benchmarks.contenders import UNDER_AUTOCAST
from benchmarks.words import source, table

NETWORKS = {"long": "GPT-2, 124M", "short": "GPT-2, 124M", "xl": "GPT-2, 1.5B"}
EXACT, COMPACT, FLASH = "mpt exact, fp16", "mpt compact, bf16", "flashoptim 24 bits and 8, bf16"


def steps(result: dict[str, Any]) -> str:
    """The optimizer's step, a table for each model."""
    parts = []
    for name, piece in found(result, "step:", "tensors:"):
        rows = [
            [
                case,
                f"{1e3 * one['device_s']:.2f}",
                f"{one['share_of_copy']:.0%}",
                f"{one['device_times_under_autocast']:.2f}",
                f"{1e3 * one['median_s']:.2f}",
                f"{one['times_under_autocast']:.2f}",
                one["host_synchronization"] or "",
            ]
            for case, one in piece["cases"].items()
        ]
        times = f"times `{UNDER_AUTOCAST}`"
        of = f"{piece['parameters'] / 1e6:.0f}M parameters in {piece['tensors']} tensors ({name.partition(':')[2]})"
        parts.append(
            table(
                [of, "device, ms", "of a copy's bandwidth", times, "from idle, ms", times, "waits for the device"], rows
            )
        )
    return "\n\n".join([*parts, *left_out(result, "step:", "tensors:")]) + source(result)


def trained(result: dict[str, Any]) -> str:
    """Peaks and step times of whole training steps through the Trainer."""
    pieces = dict(found(result, "train:"))
    rows = []
    for name, piece in pieces.items():
        _, length, precision = name.split(":", 2)
        fp32 = pieces.get(f"train:{length}:32-true")
        rows.append(
            [
                f"{NETWORKS[length]}, {piece['batch_size']} x {piece['seq_len']}",
                f"`{precision}`",
                f"{piece['peak_bytes'] / 2**30:.2f} GiB",
                "" if fp32 is None else f"{piece['peak_bytes'] / fp32['peak_bytes']:.3f}",
                f"{piece['categories']['unattributed']} B",
                "{:.1f} ({:.1f} to {:.1f})".format(
                    *(1e3 * piece[key] for key in ("step_s", "step_p20_s", "step_p80_s"))
                ),
                "not finite" if piece["losses"][-1] is None else f"{piece['losses'][-1]:.3f}",
            ]
        )
    head = ["network", "precision", "peak", "of `32-true`", "unattributed", "ms a step (p20 to p80)", "last loss"]
    return "\n\n".join([table(head, rows), *left_out(result, "train:")]) + source(result)


def others(result: dict[str, Any]) -> str:
    """Cross entropy beside torch's, and what recording costs."""
    rows = [
        [
            f"cross entropy of {piece['rows']} x {piece['classes']} bf16 logits, {name}",
            f"{1e3 * one['median_s']:.2f} ms",
        ]
        for _, piece in found(result, "loss:")
        for name, one in piece["cases"].items()
    ]
    rows += [
        [f"a step of GPT-2, {piece['batch_size']} x {piece['seq_len']}, {what}", f"{piece[key]:.3f} times"]
        for _, piece in found(result, "recording:")
        for what, key in (("recorded", "recording"), ("with a recorder that is done", "not_recording"))
    ]
    parts = [table(["what", "median"], rows)] if rows else []
    parts += left_out(result, "loss:", "recording:")
    return "\n\n".join(parts) + source(result)


def tests(result: dict[str, Any]) -> str:
    """How the tests that need a GPU went."""
    piece = result["pieces"]["tests"]
    failed = [line.partition(" - ")[0].removeprefix("FAILED ") for line in piece["failed"]]
    said = f"The tests marked `cuda`: {piece['closing_line']}."
    return "\n".join([said, *(f"- failed: `{name}`" for name in failed)]) + source(result)


def speed(result: dict[str, Any]) -> str:
    """In a sentence: how near the step comes to the bandwidth of the memory."""
    (_, large), (_, small) = (next(found(result, name)) for name in ("step:100M", "tensors:1000"))
    exact, compact = (large["cases"][name] for name in (EXACT, COMPACT))
    share, times = exact["share_of_copy"], "device_times_under_autocast"
    flash = small["cases"][FLASH]["median_s"] / small["cases"][COMPACT]["median_s"]
    return (
        f"An optimizer step over {large['parameters'] / 1e6:.0f} million parameters on a GPU runs at {share:.0%} of "
        f"the bandwidth of a copy, in {exact[times]:.2f} of the device's\ntime for fused FP32 AdamW with what mixed "
        f"precision adds to it; `compact` in {compact[times]:.2f}. Over 1000 small tensors, the "
        f"host's part\nincluded, `compact` is {flash:.1f} times as fast as FlashOptim."
    ) + source(result)


def found(result: dict[str, Any], *beginnings: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The pieces of these names that were measured."""
    for name, piece in result["pieces"].items():
        if name.startswith(beginnings) and "summary" in piece:
            yield name, piece


def left_out(result: dict[str, Any], *beginnings: str) -> list[str]:
    """Sentences about the pieces of these names that were not measured."""
    why = {name: piece["error"] for name, piece in result["pieces"].items() if "error" in piece}
    own = [name for name in why if name.startswith(beginnings)]
    late = [f"`{name}`" for name in own if why[name].startswith("left out")]
    failed = [f"`{name}` {why[name]}" for name in own if not why[name].startswith("left out")]
    told = [f"Not measured in that run, whose time was over: {', '.join(late)}."] if late else []
    return told + ([f"Not measured: {'; '.join(failed)}."] if failed else [])
