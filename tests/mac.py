"A pretended device without float64: tensors that say they are on mps and hold the CPU's numbers"
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

MPS = torch.device('mps')
REFUSAL = ("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support "
           'float64. Please use float32 instead.')


class Mac(torch.Tensor):
    "What is computed from one is one, and none is in float64"
    device = property(lambda self: MPS)
    is_cpu, is_mps = property(lambda self: False), property(lambda self: True)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return refused(super().__torch_function__(func, types, args, kwargs or {}))

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            twin = self.detach().clone().requires_grad_(self.requires_grad)
            if isinstance(self, torch.nn.Parameter): twin._is_param = True
            memo[id(self)] = twin
        return memo[id(self)]


def refused(out):
    if any(isinstance(t, Mac) and t.dtype == torch.float64 for t in tree_leaves(out)):
        raise TypeError(REFUSAL)
    return out


def on_mac(out):
    "Tensors as the device's own"
    return refused(tree_map(
        lambda t: t.as_subclass(Mac) if isinstance(t, torch.Tensor) else t, out))


def _is_device(value): return isinstance(value, (str, torch.device))


class Pretend(TorchFunctionMode):
    "Inside, `device='mps'` makes such tensors, `.to` and `.cpu` move them, `.numpy()` is refused"
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cpu: return args[0].as_subclass(torch.Tensor)
        if func in (torch.Tensor.numpy, torch.Tensor.__array__) and isinstance(args[0], Mac):
            raise TypeError("can't convert mps:0 device type tensor to numpy")
        if func is torch.Tensor.to: return self.move(*args, **kwargs)
        device = kwargs.get('device')
        if device is None or torch.device(device).type != 'mps': return func(*args, **kwargs)
        return on_mac(func(*args, **kwargs | dict(device='cpu')))

    def move(self, x, *args, **kwargs):
        devices = [a for a in (*args, kwargs.pop('device', None)) if _is_device(a)] + [
            a.device for a in args if isinstance(a, torch.Tensor)]
        types = [getattr(a, 'dtype', a) for a in args]
        types = [t for t in types if isinstance(t, torch.dtype)] or [kwargs.pop('dtype', None)]
        device = torch.device(devices[0]) if devices else x.device
        plain = x.as_subclass(torch.Tensor).to(dtype=types[0], **kwargs)
        return on_mac(plain) if device.type == 'mps' else plain


def moved(model):
    "A model on the device"
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try: return model.to(MPS)
    finally: torch.__future__.set_overwrite_module_params_on_conversion(before)
