"""What compilation for training and for generation have in common."""

import os
import platform
import zlib
from pathlib import Path

import torch
import torch._dynamo.config as dynamo_config
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from torchft.files import cache_folder


def prepare() -> Path:
    """From here on compiled code is kept in the user's cache folder, apart for each version of torch and Python and
    kind of processor, and a class of blocks may have many graphs.

    Call it before the first compilation. Returns the folder; $TORCHINDUCTOR_CACHE_DIR and $TRITON_CACHE_DIR win if they
    are set. Without it torch uses the folder for temporary files, which rarely outlives a machine's restart.
    """
    # Eight kinds of layers (Gemma 4) in the five lengths of compiled prefills are 40 graphs, besides those of steps and
    # of training, with and without gradients and adapters; torch's 8 hold for all blocks of a class together.
    dynamo_config.recompile_limit, dynamo_config.accumulated_recompile_limit = 256, 1024
    folder = cache_folder() / "compiled" / f"torch-{torch.__version__}-py{platform.python_version()}-{_processor()}"
    for name, path in {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": folder / "triton"}.items():
        if os.environ.get(name, default_cache_dir()).startswith(default_cache_dir()):  # torch sets them when imported
            os.environ[name] = str(path)
    return Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])


def _processor() -> str:
    """A name for the instructions that compiled code may use. Machines that share a home folder need not be alike, and
    code of one, which torch finds by its source, ends a process of another (seen: AVX2's, where torch used AVX-512)."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else [platform.processor()]
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])
    return f"{torch.backends.cpu.get_cpu_capability()}-{zlib.crc32(flags.encode()):08x}"
