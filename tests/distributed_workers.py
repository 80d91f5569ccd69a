"What the processes of test_distributed.py run: workers import it by name"
import os
import signal
from pathlib import Path

import torch
from torch import nn

from weat_nb.distributed import (
    all_mean, barrier, data_parallel, is_main, my_share, rank, synchronise_batchnorm, world_size,
)
from weat_nb.losses import get_objective
from weat_nb.models import create_model
from weat_nb.pgd import pgd, starting_point


def train(name, updates=5, batch_size=8):
    """Losses, parameters and buffers of adversarial training in float64, its batches and noise
    drawn from one generator"""
    objective, model = get_objective(name), create_model('resnet8', 10, 1, 28, seed=0).double()
    shared = data_parallel(synchronise_batchnorm(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=.1, momentum=.9, weight_decay=5e-4)
    generator, losses, radii = (torch.Generator().manual_seed(0), [],
                                dict(eps=.1, step_size=.03, steps=2))
    for _ in range(updates):
        x = torch.rand(batch_size, 1, 28, 28, generator=generator, dtype=torch.float64)
        y = torch.randint(10, (batch_size,), generator=generator)
        start = my_share(starting_point(x, .1, start=objective.start, generator=generator))
        x, y = my_share(x), my_share(y)
        x_adv = pgd(model, x, y, loss=objective.attack, start=start, **radii)
        logits = shared(x) if objective.needs_clean else None
        loss = objective.loss(logits, shared(x_adv), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(all_mean(loss).item())
    flat = nn.utils.parameters_to_vector(model.parameters())
    buffers = torch.cat([b.flatten().double() for b in model.buffers()])
    return dict(losses=losses, parameters=flat.tolist(), buffers=buffers.tolist())


def both(): return [train('trades'), train('sat')]


def batchnorm(rounds=2):
    "Output, gradients, statistics of a layer with input far from 0, gathered in the batch's order"
    generator, bn = torch.Generator().manual_seed(0), nn.BatchNorm2d(3, momentum=None).double()
    bn = synchronise_batchnorm(bn)
    found = {}
    for _ in range(rounds):
        whole = 1e3 + torch.randn(4, 3, 5, 5, generator=generator, dtype=torch.float64)
        weight = torch.randn(4, 3, 5, 5, generator=generator, dtype=torch.float64)
        x = my_share(whole).clone().requires_grad_()
        y = bn(x)
        bn.zero_grad()
        (y**2*my_share(weight)).sum().backward()
        for name, t in (('y', y.detach()), ('gradient', x.grad)):
            full = torch.zeros_like(whole)
            full[rank()::world_size()] = t
            found[name] = (all_mean(full)*world_size()).tolist()
    for name, p in bn.named_parameters(): found[name] = (all_mean(p.grad)*world_size()).tolist()
    found.update({name: b.tolist() for name, b in bn.named_buffers()})
    bn.eval()
    return dict(found, evaluated=bn(whole).tolist())


def batchnorm_bf16():
    "Type of the output and of the gradient, and the mean of the output, for half-precision input"
    bn = synchronise_batchnorm(nn.BatchNorm2d(3))
    x = my_share(torch.randn(
        8, 3, 6, 6, generator=torch.Generator().manual_seed(0)).bfloat16()).requires_grad_()
    y = bn(x)
    y.float().square().sum().backward()
    return [str(y.dtype), str(x.grad.dtype), all_mean(y.detach().float().mean()).item()]


def batchnorms(): return dict(batchnorm(), halves=batchnorm_bf16())


def count(folder, updates, dies_at, times=1):
    "Count to `updates`, a file at a time; in first attempts the last process is killed on the way"
    folder, attempt = Path(folder), int(os.environ['TORCHELASTIC_RESTART_COUNT'])
    (folder/f'attempt-{attempt}-{rank()}').write_text(str(os.getpid()))
    began = len(list(folder.glob('update-*')))
    barrier()
    for done in range(began + 1, updates + 1):
        if attempt < times and done >= dies_at and rank() == world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        barrier()
        if is_main(): (folder/f'update-{done}').touch()
        barrier()
    return [began, done, world_size()]


def fails(folder, number):
    "An error in one process while the others wait for it"
    (Path(folder)/f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}-{rank()}").touch()
    if rank() == number: raise ValueError(f'lr = {number}.5 is not allowed')
    barrier()


def share(n):
    try: return my_share(torch.arange(n)).tolist()
    except ValueError as e: return str(e)


def together():
    "What needs no launch of its own"
    return dict(both=both(), batchnorms=batchnorms(), shares=[share(4), share(5)])


def facts():
    return [rank(), world_size(), is_main(), torch.get_num_threads(),
            signal.getsignal(signal.SIGINT) == signal.SIG_DFL]


def tensor(): return torch.zeros(1)


def sleeps(folder):
    (Path(folder)/f'{rank()}').write_text(str(os.getpid()))
    signal.pause()
