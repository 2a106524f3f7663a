"""`forebay quantize`: a checkpoint in NVFP4, as NVIDIA ModelOpt would make it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.target import fail
from shared.errors import Fault

if TYPE_CHECKING:
    from shared.engine.quantizer.job import Result


def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A model in bfloat16 or block FP8: directory or name.")],
    directory: Annotated[Path, typer.Argument(metavar="DST", help="Directory to write: new, empty or unfinished.")],
    modules: Annotated[
        str, typer.Option(help="routed-experts or all-linears; default: experts of a mixture, else all.")
    ] = "",
    processes: Annotated[int, typer.Option(min=1, help="Processes that write shards.")] = 1,
    shard_gb: Annotated[float, typer.Option(min=0.001, help="Largest file, in 10^9 bytes.")] = 5.0,
    keep_fp8: Annotated[
        bool, typer.Option("--keep-fp8", help="Leave FP8 layers that are not quantized as they are, not in bfloat16.")
    ] = False,
    calibrate: Annotated[
        Path | None,
        typer.Option(metavar="PROMPTS", help="Prompts (.txt, one a line, or .jsonl) to measure activations on."),
    ] = None,
) -> None:
    """Quantize a checkpoint to NVFP4. Killed half-way, the same command goes on where it was."""
    from shared.engine.quantizer import calibration, job
    from shared.engine.quantizer.choice import Modules
    from shared.models import store

    if modules and modules not in list(Modules):
        fail(f"--modules is one of {', '.join(Modules)}")
    try:
        path = store.resolve(source)
        prompts = calibration.read_prompts(calibrate, path) if calibrate else None
        options = job.Options(
            Modules(modules) if modules else None,
            round(shard_gb * 1e9),
            prompts.identity if prompts else None,
            keep_fp8,
        )
        result = job.run(
            path,
            directory,
            options,
            progress=_bar,
            num_processes=processes,
            calibrate=prompts.measure if prompts else None,
        )
    except Fault as fault:
        fail(fault.message)
    except KeyboardInterrupt:
        fail("stopped; the same command goes on where it was")
    typer.echo(_summary(directory, result))


def _bar(num_bytes: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=num_bytes, desc="quantizing", unit="B", unit_scale=True, disable=None)


def _summary(directory: Path, result: "Result") -> str:
    kept = f", {result.num_kept} of them from an earlier run" if result.num_kept else ""
    return (
        f"{directory}: {result.num_quantized:,} linear layers in NVFP4, {result.num_shards} files{kept}, "
        f"{result.source_bytes / 1e9:,.2f} GB made {result.num_bytes / 1e9:,.2f} GB"
    )
