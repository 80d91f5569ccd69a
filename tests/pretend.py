"""A GPU for a machine that has none: tensors that say they are on cuda:0 and are held by the CPU.

    from pretend import install; gpu = install() # first, in a process of its own
    pytest -n0 -p pretend tests/gpu.py           # a pytest that has it, with tests/ in PYTHONPATH
    python tests/pretend.py -m weat_nb.check     # a module, or a file, on it

What a GPU refuses is a RuntimeError that names the operation and the line of the package: tensors
of two devices, a generator of the wrong one, strides that a fused optimiser cannot take, and,
inside the capture of a CUDA graph, whatever waits for the GPU or comes from the CPU. What it does
is counted by the line that asked for it:

    gpu.launches  operations outside of graphs, a replay is one   gpu.captured  those inside
    gpu.syncs     where the CPU waits for the GPU                 gpu.uploads   copies to the GPU
    gpu.clear()   all of them back to nothing                     gpu.line()    the line of now

A graph is recorded as operations and replayed over the same memory. Before a replay NaN is put
wherever it reads or writes and no tensor of the program lies, since a GPU would have given that
memory to others. `gpu.forget(tensors)` puts NaN into all memory of all graphs but that of the
tensors named: what the next replay does not write itself, or is not given, shows in its results.
`gpu.largest = n` leaves memory for tensors of up to n bytes.

What it does not know: cuDNN and its layouts, CUDA's own list of autocast, how long anything takes,
more than one GPU. A test that holds here is one of what a program asks of a GPU.
"""
import math
import os
import runpy
import sys
import time
from collections import Counter, defaultdict
from contextlib import contextmanager, nullcontext
from functools import cache
from types import SimpleNamespace
from weakref import WeakSet

import torch
import torch._dynamo # before functions are replaced: it looks at all of them
from torch import Tensor
from torch.optim.optimizer import _foreach_supported_types
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

CPU, CUDA = torch.device('cpu'), torch.device('cuda', 0)
HERE = (os.path.dirname(torch.__file__), __file__)
PACKAGE = f'{os.sep}weat_nb{os.sep}'
# results whose size or value the CPU needs before it can go on
SYNCS = {'_local_scalar_dense', 'nonzero', 'equal', 'is_nonzero', 'masked_select', '_unique',
         '_unique2', 'unique_dim', 'unique_consecutive', 'bincount', 'allclose', '_linalg_svd',
         '_linalg_eigh'}
INDEXING = {'index', 'index_put', 'index_put_', '_index_put_impl_'}
NO_KERNEL = {'_unsafe_view', 'empty', 'empty_like', 'empty_strided', 'new_empty',
             'new_empty_strided', 'resize_', 'set_', '_local_scalar_dense', 'record_stream'}


class Cuda(Tensor):
    "A tensor on the pretended GPU: the CPU's memory under another type"
    __torch_function__ = torch._C._disabled_torch_function_impl
    device, is_cuda, is_cpu = (property(lambda self, v=v: v) for v in (CUDA, True, False))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return gpu.run(func, args, kwargs or {})

    def cpu(self, **how): return self.to('cpu')
    def cuda(self, *where, **how): return self
    def get_device(self): return 0
    def tolist(self): return self.detach().cpu().tolist()
    def __repr__(self, **how): return f"{plain(self)!r:.400} on {CUDA}"
    def __format__(self, spec): return format(self.cpu(), spec)
    def __reduce_ex__(self, protocol): raise TypeError('a tensor of the pretended GPU is pickled')

    def numpy(self, **how):
        raise TypeError(f"can't convert cuda:0 device type tensor to numpy: {gpu.line()}. "
                        'Use Tensor.cpu() to copy the tensor to host memory first.')
    __array__ = numpy

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            with torch.no_grad(): twin = self.detach().clone()
            if getattr(self, '_is_param', False): twin._is_param = True
            memo[id(self)] = twin.requires_grad_(self.requires_grad)
            if self.grad is not None: twin.grad = self.grad.detach().clone()
        return memo[id(self)]


def plain(t):
    "The same memory as a CPU's tensor"
    with no_dispatch(): return t.detach()


def ours(t): return t if isinstance(t, Cuda) else Tensor._make_subclass(Cuda, t)

def tensors(*values):
    "Those among the arguments of an operation, or its results"
    found = []
    for v in values:
        if isinstance(v, Tensor): found.append(v)
        elif isinstance(v, (list, tuple)): found += tensors(*v)
        elif isinstance(v, dict): found += tensors(*v.values())
    return found


def each(change, value):
    "The same with every tensor changed"
    if isinstance(value, Tensor): return change(value)
    if isinstance(value, (list, tuple)): return type(value)(each(change, v) for v in value)
    if isinstance(value, dict): return {k: each(change, v) for k, v in value.items()}
    return value


def memory(t): return t.untyped_storage()._cdata
def layout(t): return [step for size, step in zip(t.shape, t.stride()) if size > 1]
def is_cuda(device): return device is not None and torch.device(device).type == 'cuda'


class Crossing(torch.autograd.Function):
    "A copy of a tensor on the other device; its gradient goes back"
    @staticmethod
    def forward(ctx, x):
        if isinstance(x, Cuda): gpu.sync('a copy to the CPU')
        else: gpu.upload('a copy from the CPU')
        with no_dispatch(): twin = x.detach().clone()
        return twin if isinstance(x, Cuda) else ours(twin)

    @staticmethod
    def backward(ctx, gradient): return Crossing.apply(gradient)


@cache
def kernels(func):
    "Does an operation compute anything, or is it a view, an allocation, a note?"
    views = [r for r in func._schema.returns if r.alias_info and not r.alias_info.is_write]
    return not views and name_of(func) not in NO_KERNEL


def name_of(func): return func._schema.name.partition('::')[2]


class Gpu(TorchDispatchMode):
    "What happens on the pretended GPU"
    @classmethod
    def _should_skip_dynamo(cls): return False # nothing is compiled here, and its import is slow

    def __init__(self):
        super().__init__()
        self.launches, self.captured, self.syncs, self.uploads = (Counter() for _ in range(4))
        self.graph = self.largest = None # the graph that is being captured
        self.graphs = WeakSet() # that were captured
        self.generators = set() # those of the GPU

    def clear(self):
        for counts in (self.launches, self.captured, self.syncs, self.uploads): counts.clear()

    def forget(self, *static):
        "NaN into all memory of all graphs in which none of these tensors lies"
        kept = set(map(memory, static))
        for graph in self.graphs: graph.forget(lambda found: memory(found[0]) in kept)

    def line(self):
        "The line of the package that is being run; of another file where it is not"
        frame, outside = sys._getframe(1), None
        while frame is not None:
            file = frame.f_code.co_filename
            if PACKAGE in file: break
            if outside is None and not file.startswith(HERE): outside = frame
            frame = frame.f_back
        frame = frame or outside or sys._getframe(1)
        return f'{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}'

    def refuse(self, what): raise RuntimeError(f'{what} ({self.line()})')

    def wait(self, counts, what):
        if self.graph is not None: self.refuse(f'{what} inside the capture of a CUDA graph')
        counts[f'{self.line()} {what}'] += 1

    def sync(self, what): self.wait(self.syncs, what)
    def upload(self, what): self.wait(self.uploads, what)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def run(self, func, args, kwargs):
        "An operation: on the CPU, where nothing in it is on the GPU"
        name, given, to = name_of(func), tensors(args, kwargs), kwargs.get('device')
        generator = kwargs.get('generator')
        on_gpu = is_cuda(to) or any(isinstance(t, Cuda) for t in given)
        if generator is not None and (generator._cdata in self.generators) != on_gpu:
            self.refuse(f'{name} on {"cuda" if on_gpu else "cpu"} draws from a generator of '
                        f'{"cpu" if on_gpu else "cuda"}')
        if to is not None and torch.device(to).type == 'meta': # a shape, which nobody computes
            with no_dispatch(): return func(*args, **kwargs)
        if not on_gpu: return func(*args, **kwargs)
        self.check(name, args, kwargs, given, generator)
        if to is not None: kwargs = {**kwargs, 'device': CPU}
        recorded = self.graph is not None and kernels(func)
        if recorded:
            self.graph.constants.update(memory(t) for t in given if not isinstance(t, Cuda))
            before = each(plain, (func, args, kwargs))
        with no_dispatch(): out = func(*args, **kwargs)
        if self.largest is not None and any(t.nbytes > self.largest for t in tensors(out)):
            raise torch.OutOfMemoryError(f'CUDA out of memory: {name} ({self.line()})')
        if kernels(func): (self.captured if recorded else self.launches)[self.line()] += 1
        if recorded: self.graph.ops.append((*before, each(plain, out)))
        return each(ours, out)

    def check(self, name, args, kwargs, given, generator):
        "What a GPU refuses, waits for, or has to be sent"
        others = [t for t in given if not isinstance(t, Cuda)]
        if name in ('copy_', '_to_copy') and others: # the last is the source
            (self.sync if isinstance(given[-1], Cuda) else self.upload)(name)
        elif name in INDEXING and isinstance(args[0], Cuda) and len(given) > 1:
            if any(t.dtype in (torch.bool, torch.uint8) for t in tensors(args[1])):
                self.sync(f'{name} by a mask')
            if others: self.upload(f'{name} by a tensor of the CPU')
        # one without dimensions is a number to a kernel; one expanded from a number is the zero
        # that forward-mode differentiation makes where it thinks that it is; likewise the zeros
        # into which the backward pass of a sort scatters, up to torch 2.6
        elif any(any(t.stride()) for t in others) and not (
                name == 'scatter' and torch._C._current_graph_task_id() >= 0):
            self.refuse(f'{name} of tensors on cuda:0 and cpu: ' + ', '.join(
                f'{tuple(t.shape)} on {t.device}' for t in given))
        if name in SYNCS or name == 'repeat_interleave' and kwargs.get('output_size') is None:
            self.sync(name)
        if self.graph is not None and generator is not None and (
                generator._cdata not in self.graph.generators):
            self.refuse(f'{name} draws from a generator that the graph does not know')
        if name.startswith('_fused_'): # parameters, gradients, momentum
            for p, *rest in zip(*(a for a in args[:3] if a)):
                if any(layout(t) != layout(p) for t in rest):
                    self.refuse(f'{name}: a parameter {tuple(p.shape)} of strides {p.stride()} '
                                f'and {[t.stride() for t in rest]} of its gradient and state')


class CUDAGraph:
    "Operations, replayed over the memory that they were captured on"
    def __init__(self, *how, **options):
        self.ops, self.generators = [], set()
        self.buffers, self.constants = {}, set() # by address: tensors; the CPU's numbers

    def register_generator_state(self, generator): self.generators.add(generator._cdata)
    def pool(self): return 0, 0
    def reset(self): self.__init__()

    def capture_begin(self, *how, **options):
        if gpu.graph is not None: gpu.refuse('a capture inside a capture')
        gpu.graph = self

    def capture_end(self):
        gpu.graph, self.buffers = None, defaultdict(list)
        gpu.graphs.add(self)
        for t in tensors(self.ops):
            if memory(t) not in self.constants: self.buffers[memory(t)].append(t)

    def replay(self):
        if gpu.graph is not None: gpu.refuse('a replay inside a capture')
        if not self.ops: gpu.refuse('a replay of a graph in which nothing was captured')
        gpu.launches[gpu.line()] += 1
        self.forget(in_use)
        with no_dispatch(), torch.no_grad(), real_autocast('cpu', enabled=False):
            for func, args, kwargs, out in self.ops:
                for old, new in zip(tensors(out), tensors(func(*args, **kwargs))):
                    if memory(old) != memory(new): old.copy_(new)

    def forget(self, kept):
        "NaN into the memory of the tensors that are not `kept`"
        with no_dispatch(), torch.no_grad():
            for found in self.buffers.values():
                if kept(found): continue
                t, kind = found[0], found[0].dtype
                everything = t.as_strided((t.untyped_storage().nbytes()//t.element_size(),),
                                          (1,), 0)
                everything.fill_(math.nan if kind.is_floating_point or kind.is_complex
                                 else True if kind == torch.bool else torch.iinfo(kind).max)


def in_use(recorded):
    "Does a tensor beside those of the recording lie there?"
    storage = recorded[0].untyped_storage() # holds it, too
    return torch._C._storage_Use_Count(storage._cdata) > len(recorded) + 1


@contextmanager
def capture(graph, *how, **options):
    "`torch.cuda.graph`"
    graph.capture_begin()
    try: yield
    finally: graph.capture_end()


class Stream:
    "In order with all others"
    device, cuda_stream = CUDA, 0
    def __init__(self, *how, **options): pass
    def wait_stream(self, other): pass
    def wait_event(self, event): pass
    def record_event(self, event=None): return event or Event()
    def query(self): return True
    def is_capturing(self): return gpu.graph is not None
    def synchronize(self): gpu.sync('Stream.synchronize')


class Event:
    "The time at which the CPU came by"
    def __init__(self, *how, **options): self.at = None
    def record(self, stream=None): self.at = time.perf_counter()
    def wait(self, stream=None): pass
    def query(self): return True
    def synchronize(self): gpu.sync('Event.synchronize')
    def elapsed_time(self, end): return 1000*(end.at - self.at)


class Generator(torch._C.Generator):
    "Draws as the CPU's does, wherever it is"
    def __new__(cls, device='cpu'):
        new = super().__new__(cls, 'cpu')
        new.place = CUDA if is_cuda(device) else torch.device(device)
        # an address may have been that of another generator
        (gpu.generators.add if is_cuda(device) else gpu.generators.discard)(new._cdata)
        return new
    device = property(lambda self: self.place)

    def manual_seed(self, seed):
        super().manual_seed(seed)
        return self


real_autocast, real_to, real_enabled = torch.autocast, Tensor.to, torch.is_autocast_enabled


class Autocast(real_autocast):
    "That of the CPU"
    def __init__(self, device_type, *how, **options):
        super().__init__('cpu' if device_type == 'cuda' else device_type, *how, **options)


def to(self, *how, copy=False, **options):
    "`Tensor.to`"
    if 'other' in options: how = (options.pop('other'), *how)
    if how and isinstance(how[0], Tensor): how = (how[0].device, how[0].dtype, *how[1:])
    device, dtype, non_blocking, layout = torch._C._nn._parse_to(*how, **options)
    if device is not None and device.type in ('cpu', 'cuda'):
        if (device.type == 'cuda') != isinstance(self, Cuda): self = Crossing.apply(self)
        device = None
    options = dict(device=device, dtype=dtype, memory_format=layout)
    options = {k: v for k, v in options.items() if v is not None}
    return real_to(self, copy=copy, **options) if options or copy else self


def from_cpu(make):
    "`torch.tensor` and its like: made on the CPU, then sent"
    def made(data, *how, device=None, **options):
        if not is_cuda(device): return make(data, *how, device=device, **options)
        return make(data, *how, **options).to(device)
    return made


gpu = Gpu()


def install():
    "From here on this process has a GPU; what happens on it is told by what is returned"
    always = lambda value=None: lambda *how, **options: value # each is another function
    stream, memory_free = Stream(), 80*2**30
    named = dict(name='Pretended GPU', major=9, minor=0, total_memory=memory_free,
                 multi_processor_count=100)
    for name, value in dict(
            is_available=always(True), is_initialized=always(True), init=always(),
            _lazy_init=always(), device_count=always(1), current_device=always(0),
            set_device=always(), get_device_name=always(named['name']),
            get_device_capability=always((9, 0)), get_arch_list=always(['sm_90']),
            get_device_properties=always(SimpleNamespace(**named)),
            is_bf16_supported=always(True), empty_cache=always(), ipc_collect=always(),
            memory_allocated=always(0), max_memory_allocated=always(0), memory_reserved=always(0),
            max_memory_reserved=always(0), reset_peak_memory_stats=always(),
            mem_get_info=always((memory_free, memory_free)),
            synchronize=lambda *how: gpu.sync('torch.cuda.synchronize'),
            Stream=Stream, Event=Event, current_stream=always(stream),
            default_stream=always(stream), stream=always(nullcontext()),
            device=always(nullcontext()), CUDAGraph=CUDAGraph, graph=capture,
            is_current_stream_capturing=lambda: gpu.graph is not None,
            graph_pool_handle=always((0, 0)), manual_seed=always(), manual_seed_all=always(),
            seed=always(), seed_all=always(), initial_seed=lambda: torch.initial_seed(),
            get_rng_state=lambda *how: torch.get_rng_state(),
            set_rng_state=always()).items(): # the global generator is the CPU's
        setattr(torch.cuda, name, value)
        if hasattr(torch.cuda.random, name): setattr(torch.cuda.random, name, value)
    for name, value in dict(current_stream=stream, is_available=True, device_count=1,
                            current_device_index=0, current_accelerator=CUDA).items():
        if hasattr(torch.accelerator, name): setattr(torch.accelerator, name, always(value))
    torch.accelerator.synchronize = torch.cuda.synchronize
    torch.autocast, torch.Generator, Tensor.to = Autocast, Generator, to
    Tensor.cuda = lambda self, *how, **options: self.to('cuda')
    torch.is_autocast_enabled = lambda *kind: real_enabled(
        *('cpu' if k == 'cuda' else k for k in kind or ('cuda',)))
    for make in (torch.tensor, torch.as_tensor): setattr(torch, make.__name__, from_cpu(make))
    # a parameter that is moved to the GPU is another object; one that is moved there stays itself
    compatible = torch._has_compatible_shallow_copy_type
    torch._has_compatible_shallow_copy_type = lambda a, b: (
        isinstance(a, Cuda) == isinstance(b, Cuda) and compatible(a, b))
    _foreach_supported_types.append(Cuda) # chosen by default on a GPU
    gpu.__enter__()
    return gpu


def pytest_configure(config): install()


if __name__ == '__main__':
    from pretend import install # of the module, which everything else sees
    install()
    module = sys.argv[1] == '-m'
    sys.argv = sys.argv[1 + module:]
    if module: runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)
    else: runpy.run_path(sys.argv[0], run_name='__main__')
