"""How a command ends that failed: in one sentence, also where memory ran out or JAX finds no device.

1. `sentence_for` tells what an error means: not enough memory, no device, or None for one that is a mistake of ours.
2. Of memory it says what was being done, which the traceback's functions tell (`DOING`); how much was asked for, as far
   as the message says; how much there is; and which options of the command would take less, those that it has.
3. A thread of XLA that gets no memory ends the process without an exception: C++ calls `std::terminate`. Within
   `told_when_terminated` that ends in the same sentence.

What a command will need can be told before it loads anything: `preflight` does.
"""

import contextlib
import ctypes
import errno
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from difffract_jax.memory import Memory, host_memory, memory_for, text_of_bytes

PACKAGES = ("difffract_jax", "converters")
DOING = {
    "load_pipeline": "loading the model",
    "load_transcoders": "loading the transcoders",
    "convert_flux": "converting the model",
    "convert_transcoders": "converting the transcoders",
    "save_trees": "writing the weights",
    "encode": "encoding the prompt",
    "sample": "denoising",
    "decode_latents": "decoding the image",
    "record_run": "recording the run",
    "capture_again": "recording the run",
    "make_engine": "encoding the recorded run",
    "attribute": "tracing the circuit",
    "rank_features": "ranking features",
    "steer_batch": "drawing edited images",
    "total_effects": "computing effects",
    "carried": "splitting edges by head",
    "score_parts": "splitting an attention score",
    "validate": "validating the graph",
    "write_store": "harvesting rows",
    "open_sampler": "reading prompts",
    "run_training": "training",
    "evaluate": "measuring the transcoders",
}
"""Function of the package -> what is being done in it; of several that run within one another the innermost counts."""
LESS = {
    "weights": "--weights disk",
    "dtype": "--dtype bf16",
    "model_dtype": "--model-dtype bf16",
    "transcoder_dtype": "--transcoder-dtype bf16",
    "batch": "--batch 1",
    "sites": "fewer --sites",
    "layers": "fewer --layers",
    "buffer": "--buffer disk",
    "buffer_rows": "fewer --buffer-rows",
    "tokens_per_step": "fewer --tokens-per-step",
    "height": "a smaller --height and --width",
    "text_tokens": "fewer --text-tokens",
    "expansion_batch": "a smaller --expansion-batch",
    "mesh": "more devices with --mesh",
}
"""Option -> how to write it so that a command takes less memory, those that help most first."""
MOST_ADVICE = 4
_EXHAUSTED = re.compile(
    r"RESOURCE_EXHAUSTED|bad_alloc|[Oo]ut of memory|OUT_OF_MEMORY|[Cc]annot allocate memory|[Uu]nable to allocate"
    r"|[Ff]ailed to allocate|failed to map segment"
)
_ASKED = re.compile(r"(?:allocat\w+(?: of| request for)?|[Uu]sed) ([\d.]+) ?(bytes?\b|[KMGT]i?B?\b)")
_UNITS = {"b": 1} | {letter: 2 ** (10 * (place + 1)) for place, letter in enumerate("kmgt")}


def sentence_for(error: BaseException, options: Sequence[str] = (), line: Sequence[str] = ()) -> str | None:
    """Returns what to tell of an error that no function of ours foresaw; None if it is not of memory or a device.

    Args:
        error: that ended the command.
        options: names of the command's options.
        line: arguments of the command line.
    """
    if is_exhausted(error):
        return exhausted(error, options, line)
    return _missing_device() if isinstance(error, RuntimeError | AssertionError) else None


def is_exhausted(error: BaseException) -> bool:
    """Says whether an error means that there was not enough memory."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError | ImportError | ValueError) and bool(_EXHAUSTED.search(str(error)))


def exhausted(error: BaseException, options: Sequence[str], line: Sequence[str]) -> str:
    """Returns the sentence on an error that means too little memory; arguments as for `sentence_for`."""
    doing, asked, there = _doing(error), _asked(str(error)), _there(error)
    took = f"{doing} asked for {text_of_bytes(asked)} more" if asked else f"{doing} needs more than there is"
    return f"There is not enough memory: {took}, and {_told(there)}; {advice(options, line)}."


def advice(options: Sequence[str], line: Sequence[str] = ()) -> str:
    """Returns what a command could be given so that it takes less memory.

    Args:
        options: names of the command's options.
        line: arguments that it was given already.
    """
    given = {argument.partition("=")[0].removeprefix("--").replace("-", "_") for argument in line}
    size = {"batch", "sites", "layers", "buffer_rows", "tokens_per_step", "height", "text_tokens", "expansion_batch"}
    ways = [way for name, way in LESS.items() if name in options and (name in size or name not in given)]
    plan = "`difffract plan` says what a command needs, and `difffract doctor` what fits here"
    return f"what takes less: {', '.join(ways[:MOST_ADVICE])}; {plan}" if ways else plan


def _doing(error: BaseException) -> str:
    """Returns what the innermost known function of the traceback was doing."""
    doing, at = "the command", error.__traceback__
    while at is not None:
        code, at = at.tb_frame.f_code, at.tb_next
        if code.co_name in DOING and not {*PACKAGES}.isdisjoint(Path(code.co_filename).parts):
            doing = DOING[code.co_name]
    return doing


def _asked(message: str) -> int | None:
    """Returns how many bytes a message says were asked for; None where it does not say."""
    match = _ASKED.search(message)
    if match is None:
        return None
    return round(float(match[1].rstrip(".")) * _UNITS[match[2][0].lower()])


def _there(error: BaseException) -> Memory:
    """Returns the memory that ran out: the host's where Python or NumPy asked for it, else that of JAX's device."""
    jax: Any = sys.modules.get("jax")
    if jax is None or isinstance(error, MemoryError | OSError):
        return host_memory()
    try:
        return memory_for(jax.devices()[0])
    except (RuntimeError, AssertionError, AttributeError):
        return host_memory()


def _told(there: Memory) -> str:
    return f"{there.bound} {'has' if there.bound.startswith('the ') else 'allows'} {text_of_bytes(there.total)}"


def _missing_device() -> str | None:
    """Says what is wrong if JAX cannot start on the device that it was told to use; None if it can."""
    jax: Any = sys.modules.get("jax")
    if jax is None:
        return None
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        named = jax.config.jax_platforms
        reasons = [f"JAX_PLATFORMS={named} names none that it can use"] if named else []
        reasons += filter(None, [str(error).split("\n")[0].split(" (set JAX_PLATFORMS")[0]])
        return (
            f"JAX finds no device: {'; '.join(reasons)}. Unset JAX_PLATFORMS to use what there is, or install the "
            "device's own JAX: pip install 'difffract_jax[cuda]' or 'difffract_jax[tpu]'."
        )
    return None


@contextlib.contextmanager
def told_when_terminated(options: Sequence[str], line: Sequence[str]) -> Iterator[None]:
    """Ends the process in a sentence, with status 1, if C++ terminates it within this block for want of memory.

    Nothing is done where the C++ library is another than that of Linux.

    Args:
        options: names of the command's options.
        line: arguments of the command line.
    """
    try:
        library: Any = ctypes.CDLL("libstdc++.so.6")
        wanted = ctypes.addressof(ctypes.c_char.in_dll(library, "_ZTISt9bad_alloc"))
        set_handler, kind_of = library._ZSt13set_terminatePFvvE, library.__cxa_current_exception_type
    except (OSError, AttributeError, ValueError):
        yield
        return
    kind = ctypes.CFUNCTYPE(None)
    set_handler.restype, set_handler.argtypes, kind_of.restype = ctypes.c_void_p, [ctypes.c_void_p], ctypes.c_void_p
    # Made now: when it is wanted there is no memory to make it.
    need = f"XLA needs more than there is, and {_told(host_memory())}"
    sentence = f"Error: There is not enough memory: {need}; {advice(options, line)}.\n".encode()

    def end() -> None:
        if kind_of() == wanted:
            os.write(2, sentence)
            os._exit(1)
        if before:
            kind(before)()

    handler = kind(end)
    before: int | None = set_handler(ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        set_handler(before)
