"""What a program of minilora needs on a GPU. Knows CuPy's pool and no task."""

import os

from minilora.backend import array_module


def array_module_for(device, variant):
    """The array module of `device`, "cpu" or "cuda". The variant "tf32" has CuPy multiply in TF32.

    CuPy asks for that before its first product.
    """
    if variant == "tf32":
        os.environ["CUPY_TF32"] = "1"
    return array_module("numpy" if device == "cpu" else "cupy")


def wait_for(device):
    """Wait until a GPU has done all that it was asked for."""
    if device != "cpu":
        array_module("cupy").cuda.Device().synchronize()


def peak_memory(run):
    """{"allocated", "reserved"}: bytes of the GPU while one unit runs, at most.

    In use by arrays, and held by CuPy's pool, which had given back what it did not use.
    """
    cupy = array_module("cupy")
    pool = cupy.get_default_memory_pool()

    class Peak(cupy.cuda.MemoryHook):
        name = "Peak"
        used = pool.used_bytes()
        most = used

        def malloc_postprocess(self, **of):
            self.used += of["mem_size"]
            self.most = max(self.most, self.used)

        def free_preprocess(self, **of):
            self.used -= of["mem_size"]

    pool.free_all_blocks()
    with Peak() as peak:
        run()
    return {"allocated": peak.most, "reserved": pool.total_bytes()}
