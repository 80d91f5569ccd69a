"Models of other people at every door: they run, or one sentence says what to do before any work"
import io
import shutil
import threading
import warnings
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from merged import Merged
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from weat_nb.attacks import ATTACKS, attack
from weat_nb.cost import forward_cost
from weat_nb.data import ImageData
from weat_nb.energy import NoLogitsWarning
from weat_nb.frozen import FrozenCopy
from weat_nb.generate import class_energies, sgld
from weat_nb.guards import copied, device_of, dtype_of, unwrap, warn_if_masked
from weat_nb.landscapes import attack_energies
from weat_nb.measure import measure_energies
from weat_nb.models import create_model
from weat_nb.pgd import pgd
from weat_nb.step import TrainStep, reference_step
from weat_nb.subsets import judge_images

pytestmark = [pytest.mark.filterwarnings('ignore::DeprecationWarning'),
              pytest.mark.filterwarnings('ignore::FutureWarning')]
RADII = dict(eps=.1, step_size=.05, steps=2)
QUICK = {name: dict(steps=3) for name in ATTACKS} | {
    'square': dict(steps=20), 'cw-l2': dict(steps=5, binary_search_steps=2, initial_const=1.)}


def plain(**children):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                         nn.Linear(4*36, 5))


class Around(nn.Module):
    "A module of one's own around a network"
    def __init__(self, net=None):
        super().__init__()
        self.net = plain() if net is None else net

    def forward(self, x): return self.net(x)


class ChildCalledConvBn(Around):
    def __init__(self):
        super().__init__()
        self.conv_bn = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1))

    def forward(self, x): return self.net(x + self.conv_bn(x))


class MethodCalledConvBn(Around):
    def conv_bn(self, x): return self.net[1](self.net[0](x))

    def forward(self, x): return self.net[2:](self.conv_bn(x))


class NamesLikeOurs(Around):
    "config is no dict, and the names of ImageClassifier mean other things"
    def __init__(self):
        super().__init__()
        self.config, self.normalize, self.classify = object(), True, 'softmax'
        self.in_channels, self.conv_bn, self.linear = 'grey', True, None
        self.features, self.pairs = self.net[:3], [('a', 'b', 'c')]

    def forward(self, x): return self.net[3:](self.features(x))


class Remembers(Around):
    "Keeps its last features, a tensor with a history"
    def forward(self, x):
        self.last = [self.net[:4](x)]
        return self.net[4](self.last[0])


class OwnBuffers(Around):
    "A buffer that no state dict holds and that is replaced, not written into"
    def __init__(self):
        super().__init__()
        self.register_buffer('shift', torch.zeros(1), persistent=False)

    def forward(self, x):
        if self.training: self.shift = self.shift + x.detach().mean()
        return self.net(x - self.shift)

    def get_extra_state(self): return {'note': 'no tensor'}

    def set_extra_state(self, state): pass


class Holds(Around):
    "What cannot be copied"
    def __init__(self):
        super().__init__()
        self.lock, self.file, self.numbers = threading.Lock(), io.BytesIO(), iter(lambda: 0, 1)
        self.rows, self.deep = (i for i in range(3)), {'more': [threading.RLock()]}

    def forward(self, x):
        with self.lock: return self.net(x)


class Watcher:
    "The owner of a hook, with a lock and the model itself"
    def __init__(self, model):
        self.lock, self.model, self.seen = threading.Lock(), model, 0
        model[2].register_forward_hook(self.see)
        model[2].register_forward_pre_hook(lambda module, args: None)

    def see(self, module, args, out):
        with self.lock: self.seen += 1


def hooked():
    net = plain()
    Watcher(net)
    return net


def normed(norm):
    net = plain()
    norm(net[0])
    norm(net[4])
    net(torch.rand(3, 1, 8, 8)) # whose hooks leave weights with a history
    return net


def in_autocast():
    class Autocast(Around):
        def forward(self, x):
            with torch.autocast('cpu', torch.bfloat16): return self.net(x)
    return Autocast()


def compiled_in_place():
    net = plain()
    net.compile(backend='eager')
    return net


MODULES = {
    'plain': plain, 'child conv_bn': ChildCalledConvBn, 'method conv_bn': MethodCalledConvBn,
    'names like ours': NamesLikeOurs, 'features kept': Remembers, 'own buffers': OwnBuffers,
    'locks and files': Holds, 'hooks': hooked, 'autocast': in_autocast,
    'old weight norm': lambda: normed(nn.utils.weight_norm),
    'old spectral norm': lambda: normed(nn.utils.spectral_norm),
    'weight norm': lambda: normed(nn.utils.parametrizations.weight_norm),
    'scripted': lambda: torch.jit.script(plain()),
    'traced': lambda: torch.jit.trace(plain().eval(), torch.rand(3, 1, 8, 8)),
    'data parallel': lambda: nn.DataParallel(plain()),
    'averaged': lambda: AveragedModel(plain()),
    'compiled': lambda: torch.compile(plain(), backend='eager'),
    'compiled in place': compiled_in_place,
    'wrapped twice': lambda: AveragedModel(nn.DataParallel(plain())),
    'channels last': lambda: plain().to(memory_format=torch.channels_last),
    'data parallel inside': lambda: nn.Sequential(nn.Identity(), nn.DataParallel(plain())),
}


class Bare(nn.Module):
    "No parameters"
    def forward(self, x): return linear(x)


class Callable:
    def __call__(self, x): return linear(x)


def linear(x):
    weights = torch.linspace(-1, 1, 64*5).view(64, 5)
    return x.flatten(1)@weights.sin().to(x)


FUNCTIONS = {'function': lambda: linear, 'class': Callable, 'no parameters': Bare,
             'scripted function': lambda: torch.jit.trace(linear, torch.rand(2, 1, 8, 8)),
             'method': lambda: plain().eval().forward,
             'only a buffer': lambda: create_model_buffer()}


def create_model_buffer():
    net = Bare()
    net.register_buffer('scale', torch.ones(1))
    return net


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(1)
    return torch.rand(6, 1, 8, 8, generator=g), torch.arange(6) % 5


def rounding(kind): return .02 if kind == 'autocast' else 1e-4 # bf16


def state_of(model):
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {k: v.detach().clone() for k, v in tensors.items()}


@pytest.mark.parametrize('kind', [*MODULES, *FUNCTIONS])
def test_every_door_that_measures(kind, batch):
    x, y = batch
    model = (MODULES | FUNCTIONS)[kind]()
    before = state_of(model) if isinstance(model, nn.Module) else {}
    if isinstance(model, nn.Module): model.train(kind not in ('traced',))
    for name in ('pgd', 'apgd', 'fab', 'square', 'cw-linf'):
        x_adv = attack(name, model, x, y, eps=.1, **QUICK[name])
        assert x_adv.shape == x.shape and x_adv.isfinite().all()
    for loss in ('ce', 'kl', 'dlr'):
        start = 'gaussian' if loss == 'kl' else 'uniform'
        assert (pgd(model, x, y, loss=loss, start=start, **RADII) != x).any()
    warn_if_masked(model, x, y)
    data = ImageData((255*x).byte(), y, tuple('abcde'), 'own')
    if isinstance(model, nn.Module): model.eval()
    frozen = FrozenCopy(model)
    with torch.no_grad():
        assert torch.allclose(frozen(x), model(x).float(), atol=rounding(kind))
    assert sgld(model, x, y, steps=1, step_size=.1, friction=.5).images.shape == x.shape
    assert class_energies(model, data).shape == (5,)
    if isinstance(model, nn.Module):
        assert attack_energies(model, data, 'pgd', eps=.1, steps=1)['energy_adv'].isfinite().all()
        assert all(torch.equal(v, before[k]) for k, v in state_of(model).items())


@pytest.mark.parametrize('kind', MODULES)
def test_training_step(kind, batch):
    x, y = batch
    model = MODULES[kind]()
    step = TrainStep(model, 'weat_adv', **RADII)
    for _ in range(2):
        assert step(x, y).isfinite()
        with torch.no_grad():
            for p in model.parameters(): p.add_(p.grad, alpha=-.1).mul_(1.1)
    step.fast.refresh()
    model.eval()
    with torch.no_grad(): # the copy has followed the weights and the statistics
        assert torch.allclose(step.fast(x), model(x).float(), atol=rounding(kind))
    assert reference_step(model, x, y, objective='sat', **RADII).isfinite()


def test_distributed_wrapper(batch, tmp_path):
    "Its process group cannot be copied; its gradients are the caller's own to average"
    dist.init_process_group('gloo', store=dist.FileStore(str(tmp_path/'store'), 1), rank=0,
                            world_size=1)
    try:
        model = DistributedDataParallel(plain())
        step = TrainStep(model, 'sat', **RADII)
        assert step(*batch).isfinite() and step.parallel is model
        assert all(p.grad is not None for p in model.parameters())
    finally: dist.destroy_process_group()


class Donates(torch.autograd.Function):
    "As the backward pass of a compiled network, which overwrites what it has read"
    @staticmethod
    def forward(ctx, x): return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if torch._C._autograd._get_current_graph_task_keep_graph():
            raise RuntimeError('This backward function was compiled with non-empty donated buffers '
                               'which requires create_graph=False and retain_graph=False.')
        return grad.clone()


@pytest.mark.parametrize('name', ATTACKS)
def test_a_graph_that_is_walked_through_once(name, batch):
    model = plain().eval()
    expected = attack(name, model, *batch, eps=.1, **QUICK[name])
    donating = lambda x: Donates.apply(model(x))
    assert torch.equal(attack(name, donating, *batch, eps=.1, **QUICK[name]), expected)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('g++'), reason='needs a C++ compiler')
def test_compiled_for_real(batch):
    model = plain().eval()
    compiled = torch.compile(model)
    for name in ('pgd', 'fab'):
        x_adv = attack(name, compiled, *batch, eps=.1, **QUICK[name])
        assert torch.allclose(x_adv, attack(name, model, *batch, eps=.1, **QUICK[name]), atol=1e-5)


@dataclass
class Output:
    logits: torch.Tensor


def returning(change):
    class Returns(Around):
        def forward(self, x): return change(self.net(x))
    return Returns()


def in_place():
    class InPlace(Around):
        def forward(self, x): return self.net(x.sub_(.5).div_(.5))
    return InPlace()


def without_gradient():
    class Silent(Around):
        @torch.no_grad()
        def forward(self, x): return self.net(x)
    return Silent()


WITHOUT_WORK = {
    'dict': (lambda: returning(lambda z: {'logits': z}), r"model\(x\)\['logits'\]"),
    'tuple': (lambda: returning(lambda z: (z, z)), r'model\(x\)\[0\]'),
    'list': (lambda: returning(lambda z: [z]), r'model\(x\)\[0\]'),
    'dataclass': (lambda: returning(Output), r'model\(x\)\.logits'),
    'maps': (lambda: returning(lambda z: z[:, :, None, None]), r'model\(x\)\.flatten\(1\)'),
    'one logit': (lambda: returning(lambda z: z[:, :1]), 'zeros_like'),
    'classes': (lambda: returning(lambda z: z.argmax(1)), 'floating-point'),
    'another batch': (lambda: returning(lambda z: z.repeat(2, 1)), 'a row for each image'),
    'no gradient': (without_gradient, 'no gradient to the images'),
    'double': (lambda: plain().double(), "images are float32 and the network's weights float64"),
    'half': (lambda: plain().bfloat16(), "images are float32 and the network's weights bfloat16"),
}
TRAINED = {k: v for k, v in WITHOUT_WORK.items() if k not in ('double', 'half')} # it casts images


def always_training():
    class Always(Around):
        def eval(self): return self
    return Always()


def always_normalising():
    "Its statistics move whatever the flag says, and one buffer is replaced"
    class Normalises(Around):
        def __init__(self):
            super().__init__()
            self.register_buffer('seen', torch.zeros(1))
            self.mean, self.var = self.net[1].running_mean, self.net[1].running_var

        def forward(self, x):
            self.seen = self.seen + len(x)
            h = F.batch_norm(self.net[0](x), self.mean, self.var, training=True)
            return self.net[2:](h)
    return Normalises()


@pytest.mark.parametrize('build', [always_training, always_normalising])
def test_statistics_that_move_are_put_back(build, batch):
    model = build()
    before = state_of(model)
    for name in ('pgd', 'square'): attack(name, model, *batch, eps=.1, **QUICK[name])
    pgd(model, *batch, **RADII)
    warn_if_masked(model, *batch)
    assert all(torch.equal(v, before[k]) for k, v in state_of(model).items())


@pytest.mark.parametrize('kind', WITHOUT_WORK)
def test_one_sentence_before_any_work(kind, batch):
    build, message = WITHOUT_WORK[kind]
    model, calls = build(), []
    model.register_forward_hook(lambda *args: calls.append(1))
    gradient_attacks = [n for n in ATTACKS if ATTACKS[n].gradient or kind != 'no gradient']
    for name in gradient_attacks:
        calls.clear()
        with pytest.raises((TypeError, ValueError), match=message):
            attack(name, model, *batch, eps=.1, **QUICK[name])
        assert len(calls) <= 3
    calls.clear()
    with pytest.raises((TypeError, ValueError), match=message): pgd(model, *batch, **RADII)
    with pytest.raises((TypeError, ValueError), match=message):
        warn_if_masked(model, *batch)
    assert len(calls) <= 2


@pytest.mark.parametrize('kind', TRAINED)
def test_one_sentence_before_training(kind, batch):
    build, message = WITHOUT_WORK[kind]
    model = build()
    before = state_of(model)
    for objective in ('weat_adv', 'sat', 'standard'):
        with pytest.raises((TypeError, ValueError), match=message):
            TrainStep(model, objective, **RADII)(*batch)
        if objective == 'standard': continue
        with pytest.raises((TypeError, ValueError), match=message):
            reference_step(model, *batch, objective=objective, **RADII)
        assert all(torch.equal(v, before[k]) for k, v in state_of(model).items())


def test_what_changes_its_input(batch):
    "It would move the natural images themselves"
    model, (x, y) = in_place(), batch
    kept = x.clone()
    for call in (lambda: attack('square', model, x, y, steps=5), lambda: attack('pgd', model, x, y),
                 lambda: pgd(model, x, y, **RADII, loss='kl', start='gaussian')):
        with pytest.raises((ValueError, RuntimeError), match='in place|in-place'): call()
        assert torch.equal(x, kept)


def test_one_batch_size(batch):
    "Attacks of fixed steps run; those that take images out say so at once"
    x, y = batch
    model = plain().eval()
    class Six(nn.Module):
        def forward(self, x): return model(x.view(6, 1, 8, 8))
    for name, row in ATTACKS.items():
        if row.failed != 'x':
            expected = attack(name, model, x, y, eps=.1, **QUICK[name])
            assert torch.equal(attack(name, Six(), x, y, eps=.1, **QUICK[name]), expected)
        else:
            with pytest.raises(ValueError, match='takes 6 images and not one alone'):
                attack(name, Six(), x, y, **QUICK[name])
    assert TrainStep(nn.Sequential(nn.Identity(), Around(model)), 'sat', **RADII)(x, y).isfinite()


@pytest.mark.parametrize('model, message', [
    (lambda: linear, 'function has no parameter that requires a gradient'), (Bare, 'Bare has no'),
    (lambda: plain().requires_grad_(False), 'requires_grad_')])
def test_nothing_to_train(model, message, batch):
    step = TrainStep(model(), 'sat', **RADII)
    with pytest.raises(ValueError, match=message): step(*batch)
    with pytest.raises(ValueError, match=message):
        reference_step(model(), *batch, objective='sat', **RADII)
    assert (step.attack(*batch) != batch[0]).any() # which needs no weights


def test_frozen_models_are_attacked(batch):
    model = plain().eval()
    expected = attack('apgd', model, *batch, eps=.1, steps=3)
    assert torch.equal(attack('apgd', model.requires_grad_(False), *batch, eps=.1, steps=3),
                       expected)


def test_a_copy_shares_no_tensor():
    for kind, build in MODULES.items():
        model = unwrap(build())
        twin = copied(model)
        mine, theirs = ({t.data_ptr() for t in (*m.parameters(), *m.buffers()) if t.numel()}
                        for m in (model, twin))
        assert not mine & theirs and len(mine) == len(theirs), kind
        assert [p.requires_grad for p in twin.parameters()] == [
            p.requires_grad for p in model.parameters()]
        assert all(p.is_leaf for p in twin.parameters())


def test_what_cannot_be_copied_is_said():
    class Single(Around):
        def __deepcopy__(self, memo): raise RuntimeError('there is but one')
    with pytest.raises(TypeError, match='Single cannot be copied .there is but one.*outside'):
        TrainStep(Single(), 'sat', **RADII)


def test_a_batchnorm_that_stays_in_training_is_not_folded(batch):
    class Restless(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[1].train(True)
            return self
    model = Restless(*plain())
    frozen = FrozenCopy(model.eval())
    assert not frozen.pairs
    with torch.no_grad(): assert torch.allclose(frozen(batch[0]), model(batch[0]), atol=1e-6)


def test_pairs_are_folded_only_where_they_are_pairs():
    "Packaged names on a module whose convolution a hook or a parametrisation computes"
    model = create_model('resnet8', 5, 1, 8, seed=0)
    n = len(FrozenCopy(model).pairs)
    nn.utils.weight_norm(model.conv1)
    nn.utils.parametrizations.weight_norm(model.layer1[0].conv1)
    model.layer1[0].conv2.register_forward_hook(lambda m, args, out: 2*out)
    x = torch.rand(4, 1, 8, 8)
    model(x)
    frozen = FrozenCopy(model)
    assert len(frozen.pairs) == n - 3
    with torch.no_grad(): assert torch.allclose(frozen(x), model.eval()(x), atol=1e-5)


def test_device_and_type_of():
    assert dtype_of(linear) is None and device_of(linear) == torch.device('cpu')
    assert device_of(nn.Linear(2, 2, device='meta')).type == 'meta'
    assert device_of(nn.BatchNorm1d(2, affine=False, device='meta')).type == 'meta'
    assert dtype_of(nn.Linear(2, 2).half()) == torch.float16
    net = plain()
    compiled = torch.compile(nn.DataParallel(torch.compile(net, backend='eager')), backend='eager')
    assert unwrap(compiled) is net


def test_cost_of_modules_with_other_outputs():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(8, 2), nn.Linear(64, 5)

        def forward(self, x):
            h = x.flatten(1, 2)
            return self.head(self.attention(h, h, h)[0].flatten(1))
    assert forward_cost(Attends(), 1, 8)[0] > 0
    assert forward_cost(Bare(), 1, 8)[0] > 0


OWN = '''
import torch
from torch import nn

def plain(num_classes, in_channels, image_size, change=lambda z: z):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(in_channels*image_size**2, num_classes)
        def forward(self, x): return change(self.linear(x.flatten(1)))
    return Net()

def names(*shape):
    net = plain(*shape)
    net.config, net.features, net.normalize, net.in_channels, net.conv_bn = object(), 1, 2, 3, True
    return net

def locked(*shape):
    import threading
    net = plain(*shape)
    net.lock = threading.Lock()
    return net

def weight_norm(*shape):
    net = plain(*shape)
    nn.utils.weight_norm(net.linear)
    return net

def scripted(*shape): return torch.jit.trace(plain(*shape), torch.rand(2, *shape[1:2], 8, 8))
def parallel(*shape): return nn.DataParallel(plain(*shape))
def a_dict(*shape): return plain(*shape, change=lambda z: {'out': z})
def a_tuple(*shape): return plain(*shape, change=lambda z: (z,))
def maps(*shape): return plain(*shape, change=lambda z: z[:, :, None, None])
def one(*shape): return plain(*shape, change=lambda z: z[:, :1])
def eleven(*shape): return plain(11, *shape[1:])
def a_function(*shape): return lambda x: x
def nothing(*shape): return nn.Flatten()
def silent(*shape): return plain(*shape).requires_grad_(False)
def softmax(*shape): return plain(*shape, change=lambda z: z.softmax(1))
def log_softmax(*shape): return plain(*shape, change=lambda z: z.log_softmax(1))
def softmax_in_eval(*shape):
    net = plain(*shape)
    net.register_forward_hook(lambda m, x, z: z if m.training else z.softmax(1))
    return net
def in_place(*shape):
    net = plain(*shape)
    net.register_forward_pre_hook(lambda m, x: (x[0].sub_(.5),))
    return net
'''


@pytest.mark.parametrize('name', ['plain', 'names', 'locked', 'weight_norm', 'scripted',
                                  'parallel'])
def test_networks_of_ones_own(name, batch, tmp_path):
    (tmp_path/'own.py').write_text(OWN)
    model = create_model(f'{tmp_path}/own.py:{name}', 5, 1, 8, seed=0)
    assert TrainStep(model, 'weat_adv', **RADII)(*batch).isfinite()
    assert attack('apgd', model, *batch, eps=.1, steps=2).shape == batch[0].shape


@pytest.mark.parametrize('name, message', [
    ('a_dict', r"model\(x\)\['out'\]"), ('a_tuple', r'model\(x\)\[0\]'), ('maps', r'flatten\(1\)'),
    ('one', 'zeros_like'), ('eleven', r'\(B, 5\), given \(2, 11\)'),
    ('a_function', 'returned function'), ('nothing', 'without parameters'), ('silent', 'frozen'),
    ('in_place', 'changes the images that it is given, in place')])
def test_networks_of_ones_own_that_are_refused(name, message, tmp_path):
    (tmp_path/'own.py').write_text(OWN)
    with pytest.raises((TypeError, ValueError), match=message):
        create_model(f'{tmp_path}/own.py:{name}', 5, 1, 8, seed=0)


@pytest.mark.parametrize('name', ['softmax', 'log_softmax', 'softmax_in_eval'])
def test_scores_that_are_no_logits_are_said_once_where_a_network_is_made(name, tmp_path):
    "On a GPU nothing in training looks at them; an honest network is made without a word"
    (tmp_path/'own.py').write_text(OWN)
    with pytest.warns(NoLogitsWarning, match='the output of (log_)?softmax, not logits') as seen:
        create_model(f'{tmp_path}/own.py:{name}', 5, 1, 8, seed=0)
    assert len(seen) == 1 and seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        create_model(f'{tmp_path}/own.py:plain', 5, 1, 8, seed=0)


def test_exported_graphs(batch):
    "They have one mode for good; what stands beside them is put into the other and back"
    net, (x, y) = plain().eval(), batch
    batches = ({0: torch.export.Dim.AUTO},)
    graph = torch.export.export(net, (x,), dynamic_shapes=batches).module()
    model = nn.Sequential(nn.Dropout(.9), graph, nn.Dropout(.9))
    for m in (model, model[0], model[2]): m.training = True
    before = [m.training for m in model.modules()]
    expected = attack('pgd', net, x, y, eps=.1, steps=3)
    for given in (graph, model):
        found = attack('pgd', given, x, y, eps=.1, steps=3)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert [m.training for m in model.modules()] == before


@pytest.mark.parametrize('kind', ['no parameters', 'only a buffer', 'scripted', 'compiled'])
def test_what_a_run_measures_is_measured_of_any_network(kind, batch):
    model, (x, y) = (MODULES | FUNCTIONS)[kind](), batch
    data = ImageData((255*x).to(torch.uint8), y, tuple('abcde'), 'toy')
    measured = measure_energies(model, data, eps=.1, step_size=.05, steps=2)
    energy, correct = judge_images(model, data)
    torch.testing.assert_close(measured['energy_nat'], energy)
    assert torch.equal(measured['correct_nat'].bool(), correct)


@pytest.mark.parametrize('frozen', [False, True])
def test_layers_that_merge_their_weights_train_on_after_an_attack(frozen, batch):
    "Setting the flag alone would leave them merged, and the update without a gradient"
    x, y = batch
    model = nn.Sequential(*plain()[:4], Merged(4*36, 5)).train()
    if frozen: model[1].eval() # a part of it in the other mode stays there
    before, modes = state_of(model), [m.training for m in model.modules()]
    for measure in (lambda: attack('pgd', model, x, y, eps=.1, steps=2),
                    lambda: pgd(model, x, y, **RADII), lambda: warn_if_masked(model, x, y)):
        measure()
        assert not model[4].merged and modes == [m.training for m in model.modules()]
        assert all(torch.allclose(v, before[k], atol=1e-5) for k, v in state_of(model).items())
    F.cross_entropy(model(x), y).backward()
    assert model[4].a.grad is not None
