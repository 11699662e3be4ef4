"""The Python side of device.cpp. Importing it makes `torch.sim`, which stands where the scripts have `torch.cuda`:
streams and events that have nothing to wait for, collectives by gloo on copies, and the operations that only CUDA has.

run.py sets the environment: SIM_DEVICE names the compiled device.cpp, TRITON_INTERPRET is 1."""

import contextlib
import ctypes
import os
import types

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.attention.varlen
import torch.nn.functional as F
from torch.distributed import distributed_c10d as c10d

torch.ops.load_library(os.environ["SIM_DEVICE"])
library = ctypes.CDLL(os.environ["SIM_DEVICE"])
library.sim_bytes_held.restype = library.sim_bytes_most.restype = ctypes.c_int64

# ------------------------------------------------------------------------------------------------- torch.sim


class Event:
    """What it marks has always happened already."""

    def __init__(self, *args, **kwargs):
        pass

    def record(self, stream=None):
        return self

    def wait(self, stream=None):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True


class Stream:
    """Of operations that are over when their call returns."""

    stream_id = device_index = device_type = 0  # FSDP2 of torch 2.15 reads them

    def __init__(self, *args, **kwargs):
        pass

    def record_event(self, event=None):
        return event or Event()

    def wait_event(self, event):
        pass

    def wait_stream(self, stream):
        pass

    def synchronize(self):
        pass


sim = types.ModuleType("torch.sim")
sim.Event, sim.Stream = Event, Stream
sim.is_available = sim.is_initialized = lambda: True
sim._is_in_bad_fork = lambda: False
sim.device_count = lambda: 8
sim.get_device_capability = lambda *args: (8, 0)  # an A100's, which has no FlashAttention 3
sim.current_device = torch._C._accelerator_getDeviceIndex
sim.set_device = lambda device: torch._C._accelerator_setDeviceIndex(torch.device(device).index)
sim.current_stream = sim.default_stream = lambda *args: Stream()
sim.stream = sim.device_of = sim.device = lambda *args: contextlib.nullcontext()
sim.synchronize = sim.empty_cache = sim.ipc_collect = sim.manual_seed_all = sim.manual_seed = lambda *args: None
sim.get_rng_state = lambda *args: torch.get_rng_state()
sim.set_rng_state = lambda state, *args: torch.set_rng_state(state)
sim.memory_allocated = sim.memory_reserved = lambda *args: library.sim_bytes_held()
sim.max_memory_allocated = lambda *args: library.sim_bytes_most()
sim.reset_peak_memory_stats = lambda *args: library.sim_forget_most()
sim.mem_get_info = lambda *args: (1 << 30, 2 << 30)
torch.utils.rename_privateuse1_backend("sim")
torch._register_device_module("sim", sim)
torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
torch.Tensor.pin_memory = lambda tensor, *args: tensor


def _move(storage, source, non_blocking=False):
    if "sim" not in (storage.device.type, source.device.type):
        return _copy(storage, source, non_blocking)
    if storage.size():
        ctypes.memmove(storage.data_ptr(), source.data_ptr(), storage.size())
    return storage


_copy, torch.UntypedStorage.copy_ = torch.UntypedStorage.copy_, _move
torch.UntypedStorage.cpu = lambda storage: torch.UntypedStorage(storage.size()).copy_(storage)

# ------------------------------------------------------------------------------------------------ collectives


class Done(torch._C._distributed_c10d.Work):
    """Of a collective that is over."""

    def wait(self, timeout=None):
        return True


def cpu(tensors):
    return [t.detach().to("cpu", copy=True) for t in tensors]


def fill(tensors, values):
    for t, value in zip(tensors, values, strict=True):
        t.copy_(value.view_as(t))
    return Done()


class Collectives(dist.ProcessGroup):
    """Those that FSDP and the scripts call, by gloo on copies, for tensors of either device."""

    def __init__(self, store, rank, size, timeout):
        super().__init__(rank, size)
        self.place, self.gloo = (rank, size), dist.ProcessGroupGloo(store, rank, size, timeout=timeout)

    def rank(self):
        return self.place[0]

    def size(self):
        return self.place[1]

    def getBackendName(self):
        return "simulated"

    @property
    def _device_types(self):
        return [torch.device("sim")]

    @property
    def pg_name(self):
        return c10d._world.pg_names[self]

    group_name = pg_name

    def sum(self, values, reduce):
        """What all ranks' `values` add up to, or are on average."""
        options = c10d.AllreduceOptions()
        mean = reduce == dist.ReduceOp.AVG
        options.reduceOp = dist.ReduceOp.SUM if mean else reduce
        self.gloo.allreduce(values, options).wait()
        return [value / self.size() for value in values] if mean else values

    def allreduce(self, tensors, options=None):
        options = options or c10d.AllreduceOptions()
        return fill(tensors, self.sum(cpu(tensors), options.reduceOp))

    def broadcast(self, tensors, options):
        values = cpu(tensors)
        self.gloo.broadcast(values, options).wait()
        return fill(tensors, values)

    def scatter(self, outputs, inputs, options):
        values = cpu(outputs)
        self.gloo.scatter(values, [cpu(row) for row in inputs], options).wait()
        return fill(outputs, values)

    def allgather(self, outputs, inputs, options=None):
        values = [cpu(row) for row in outputs]
        self.gloo.allgather(values, cpu(inputs), c10d.AllgatherOptions()).wait()
        return [fill(*pair) for pair in zip(outputs, values, strict=True)][-1]

    def all_gather_single(self, output, tensor, options=None):
        return self.allgather([list(output.view(-1).chunk(self.size()))], [tensor.reshape(-1)])

    def all_gather_single_coalesced(self, outputs, tensors, options=None):
        return [self.all_gather_single(*pair) for pair in zip(outputs, tensors, strict=True)][-1]

    def reduce_scatter_single(self, output, tensor, options):
        [total] = self.sum(cpu([tensor]), options.reduceOp)
        return fill([output], [total.view(-1).chunk(self.size())[self.rank()]])

    # as torch 2.11 calls them
    _allgather_base, _reduce_scatter_base = all_gather_single, reduce_scatter_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def barrier(self, opts=None):
        self.gloo.barrier(c10d.BarrierOptions()).wait()
        return Done()


dist.Backend.register_backend("simulated", Collectives, devices=["cpu", "sim"])

# ----------------------------------------------------------------------------------- operations that only CUDA has

aten = torch.library.Library("aten", "IMPL")


def mm(a, b, out_dtype, *, out):
    """Half-precision factors, a float32 product."""
    return addmm(out, a, b, out_dtype, beta=0, out=out)


def addmm(c, a, b, out_dtype, *, beta=1, alpha=1, out):
    assert a.dtype == b.dtype and out.dtype == out_dtype == torch.float32, "as CUDA has it"
    total = alpha * (a.float() @ b.float())
    return out.copy_(total + beta * c if beta else total)


aten.impl("mm.dtype_out", mm, "PrivateUse1")
aten.impl("addmm.dtype_out", addmm, "PrivateUse1")


def varlen_attn(q, k, v, bounds_q, bounds_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    """Causal attention within rows of any length: [C, heads, d], row i from bounds[i] to bounds[i + 1]; with a window
    of the past where window_size[0] is not -1."""
    assert all(x.dtype in (torch.bfloat16, torch.float16) and x.dim() == 3 for x in (q, k, v))
    assert bounds_q.dtype == torch.int32 and bounds_q.device == q.device and torch.equal(bounds_q, bounds_k)
    before, after = window_size
    assert before >= -1 and after == 0
    visible = torch.ones(max_q, max_q, dtype=torch.bool).tril().triu(-before if before >= 0 else -max_q)
    assert enable_gqa or q.shape[1] == k.shape[1]
    ends = bounds_q.tolist()
    assert ends[0] == 0 and ends[-1] == len(q) and max(b - a for a, b in zip(ends, ends[1:])) == max_q == max_k
    rows = [slice(a, b) for a, b in zip(ends, ends[1:])]
    attend = [[x[row].transpose(0, 1)[None] for x in (q, k, v)] for row in rows]  # [1, heads, length, d]
    masks = [visible[: b - a, : b - a].to(q.device) for a, b in zip(ends, ends[1:])]
    outs = [F.scaled_dot_product_attention(*x, m, scale=scale, enable_gqa=True) for x, m in zip(attend, masks)]
    return torch.cat([out[0].transpose(0, 1) for out in outs])


torch.nn.attention.varlen.varlen_attn = varlen_attn

try:
    import triton.language as tl
    from triton.runtime import interpreter
except ImportError:
    pass
else:
    convert = interpreter._convert_float

    def round_as_cuda(values, source, target, mode):
        """Triton's interpreter cuts float32 to bf16; CUDA rounds to the nearest, ties to even."""
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, mode)
        bits = np.frombuffer(values.tobytes(), dtype=np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).reshape(values.shape)

    interpreter._convert_float = round_as_cuda
