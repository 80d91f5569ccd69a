"""Attacks that search in another arithmetic, and the verdict for a fifth of the passes: what the
network itself decides, what is written of it, what is refused"""
import copy

import pytest
import torch
from pyautoattack import AutoAttack
from test_evaluate import EPS, Rounded, images_for, numbers, short_version, tiny, whole_version
from torch import nn

import weat_nb.evaluate
from weat_nb.attack_batch import attack_batch
from weat_nb.attacks import attack, parse_attack
from weat_nb.attacked_model import AttackedModel, search_copy
from weat_nb.data import load_dataset, to_float
from weat_nb.evaluate import EvaluationWarning, attack_passes, evaluate
from weat_nb.frozen import FrozenCopy
from weat_nb.pretrained import load_pretrained
from weat_nb.record_tables import measured_table
from weat_nb.records import check_record, read_record
from weat_nb.runs import Progress
from weat_nb.smoothed_relu import smooth

ATTACKS = ('pgd-5', 'fab-5', 'cw', 'autoattack')


@pytest.fixture(autouse=True)
def short(monkeypatch): monkeypatch.setattr(AutoAttack, '_set_version', short_version)


def searching(monkeypatch, logits):
    "The copy that is searched answers with these logits, a function of the network and the images"
    class Copy(FrozenCopy):
        def __call__(self, x): return logits(super().__call__, x)
    monkeypatch.setattr(weat_nb.evaluate, 'search_copy', lambda network, x, precision:
                        None if precision == 'float32' else Copy(network))


def robust(model, data, attacks=ATTACKS, **options):
    return evaluate(model, data, attacks, batch_size=16, **{**EPS, **options}).correct


def wrong_everywhere(net, x): return net(x).flip(1)
def never_wrong(net, x): return net(x)*0 + torch.tensor([1., *[0.]*9])


@pytest.mark.parametrize('attacks', [ATTACKS, ('quick', 'cw-l2-5')], ids=str)
def test_a_copy_that_gives_every_image_away_changes_nothing(monkeypatch, attacks):
    "Where the copy alone is wrong, the network is attacked as it would have been"
    model = tiny()
    data = images_for(model)
    there = robust(model, data, attacks)
    searching(monkeypatch, wrong_everywhere)
    here = robust(model, data, attacks, search='bf16')
    few = sum(int((here[name] != there[name]).sum()) for name in there)
    assert few <= 2, few # images that begin another batch have other random numbers
    for name in ('pgd-5', 'cw'): # which have none, or each image its own
        if name in there: assert torch.equal(here[name], there[name])


def test_what_the_copy_finds_counts_only_where_the_network_is_wrong(monkeypatch):
    model, other = tiny(), tiny(1)
    data = images_for(model)
    monkeypatch.setattr(weat_nb.evaluate, 'search_copy', lambda *_: FrozenCopy(other))
    x, seen = to_float(data.images), []
    def found(part, net, *a, **how):
        out = attack_batch(part, net, *a, **how)
        if part != 'clean': seen.append((part, out['broken'].clone()))
        return out
    monkeypatch.setattr(weat_nb.evaluate, 'attack_batch', found)
    correct = robust(model, data, ('pgd-5',), search='bf16')['pgd-5']
    x_adv = attack('pgd-5', other, x, data.labels, eps=EPS['eps'], step_size=EPS['step_size'])
    with torch.no_grad(): transferred = (model(x_adv).argmax(1) != data.labels).sum()
    assert any(broken.any() for _, broken in seen) and correct.sum() < len(data) - 5
    assert (~correct).sum() >= transferred - 3


def test_a_copy_that_is_never_wrong_finds_nothing(monkeypatch):
    model = tiny()
    with torch.no_grad(): model[3].bias[0] += .5
    data = images_for(model)
    assert (data.labels == 0).sum() > 20
    there = robust(model, data, ('autoattack',))['autoattack']
    searching(monkeypatch, never_wrong)
    correct = robust(model, data, ('autoattack',), search='bf16')
    left = data.labels == 0 # the others the copy gives away, and the network is attacked
    assert torch.equal(correct['autoattack'][left], correct['clean'][left])
    assert (~there & correct['clean'])[left].any()


def test_the_networks_own_look_decides_in_float32_too(monkeypatch):
    "An image that pyautoattack takes for misclassified and the network does not"
    model = tiny()
    data = images_for(model)
    def claims(self, x, y, batch_size): return x, (y + 1) % 10
    monkeypatch.setattr(AutoAttack, 'run_standard_evaluation', claims)
    correct = robust(model, data, ('autoattack',))
    assert torch.equal(correct['autoattack'], correct['clean'])


@pytest.mark.parametrize('name', ['pgd-5', 'apgd-5', 'autoattack',
                                  'smooth-5(targets=2, order=nearest)'])
def test_passes_of_a_search(name, monkeypatch):
    "Those of the attack, and a look of the copy at x*"
    model, seen = tiny(), []
    data = images_for(model)
    steps, moved = [], weat_nb.evaluate.Progress.step
    def step(self, *a, by=1, **k):
        steps.append(by)
        return moved(self, *a, by=by, **k)
    monkeypatch.setattr(weat_nb.evaluate.Progress, 'step', step)
    searching(monkeypatch, lambda net, x: net(x))
    for search in ('float32', 'bf16'):
        steps.clear()
        correct = robust(model, data, (name,), eps=1e-7, search=search)
        seen.append(sum(steps))
        assert torch.equal(correct['clean'], [*correct.values()][-1])
    n = int(correct['clean'].sum())
    parts = len(attack_passes(name))
    assert seen[1] - seen[0] == n*parts
    if name != 'autoattack': # which is shortened here
        assert seen[0] == 2*len(data) + n*sum(attack_passes(name).values())


def test_the_record_and_the_table_say_which_arithmetic_searched(tmp_path):
    model = tiny()
    data = images_for(model, 12)
    found = evaluate(model, data, 'pgd-2, quick', tmp_path/'batches', search='bf16', **EPS)
    assert found.record['search'] == 'bf16'
    assert [row['attack'] for row in found] == ['clean', 'pgd-2, searched in bf16',
                                                'quick, searched in bf16']
    again = evaluate(model, data, 'pgd-2, quick', tmp_path/'batches', search='bf16', **EPS)
    assert numbers(again.record) == numbers(found.record)
    with pytest.raises(ValueError, match="search is 'bf16' there"):
        evaluate(model, data, 'pgd-2, quick', tmp_path/'batches', **EPS)
    file = found.save(tmp_path/'record.json')
    assert read_record(file) == found.record
    plain = evaluate(model, data, 'pgd-2, quick', **EPS)
    assert 'search' not in plain.record and 'pgd-2' in [row['attack'] for row in plain]
    with pytest.raises(FileExistsError, match="search is 'bf16' there and 'float32' here"):
        plain.save(file)
    for wrong in ('float32', 'fp8', '', None, 16):
        with pytest.raises(ValueError, match='search .* is not allowed: it must be .*tf32.*bf16'):
            check_record({**found.record, 'search': wrong})


def test_searches_are_rows_of_their_own():
    model = tiny()
    records = [evaluate(model, images_for(model, n), 'pgd-2', search=search, **EPS).record
               for search, n in (('float32', 12), ('bf16', 20))]
    table = measured_table(records)
    assert [(row['data'], row['images']) for row in table] == [
        ('toy', '12'), ('toy, searched in bf16', '20')]


@pytest.mark.parametrize('search, says', [
    ('tf32', "search = 'tf32' .* it must be float32 or bf16 on cpu; TF32"),
    ('bf32', "search 'bf32' .*|search = 'bf32' is not allowed"), (16, 'search'), (None, 'search')])
def test_an_arithmetic_that_there_is_not(search, says):
    model = tiny()
    with pytest.raises((ValueError, TypeError), match=says):
        evaluate(model, images_for(model), 'pgd-2', search=search, **EPS)


class OwnConstant(nn.Module):
    "A product with a tensor that is no part of the network's weights"
    def __init__(self):
        super().__init__()
        self.inner, self.constant = tiny(), [torch.eye(10)]

    def forward(self, x): return self.inner(x) @ self.constant[0]


def test_a_network_that_does_not_run_in_bf16():
    model = OwnConstant()
    data = images_for(model)
    with pytest.raises(ValueError, match="search = 'bf16' .* float32 for this network: a copy"):
        evaluate(model, data, 'pgd-2', search='bf16', **EPS)
    assert evaluate(model, data, 'pgd-2', **EPS).record['results'][1]['accuracy'] < 100


class Overflow(nn.Module):
    "Infinite in bf16, at once or from the second call on"
    def __init__(self, finite):
        super().__init__()
        self.inner, self.finite = tiny(), finite

    def forward(self, x):
        if x.dtype == torch.float32: return self.inner(x)
        self.finite -= 1
        return self.inner(x)/torch.tensor(float(self.finite >= 0))


@pytest.mark.parametrize('finite, error, says', [
    (0, ValueError, 'a copy of it in bf16 gives logits that are NaN or infinite'),
    (2, FloatingPointError, 'copy in bf16 are NaN or infinite at images that apgd-2 tried')])
def test_a_copy_whose_logits_are_not_finite(finite, error, says):
    model = Overflow(finite)
    with pytest.raises(error, match=says):
        evaluate(model, images_for(model), 'apgd-2', search='bf16', **EPS)
    evaluate(model, images_for(model), 'apgd-2', **EPS)


class Viewed(nn.Module):
    "Takes the memory layout of its maps for granted"
    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(1, 8, 3, stride=2), nn.Linear(72, 10)

    def forward(self, x): return self.last(self.conv(x).relu().view(len(x), -1))


class Tapped(nn.Module):
    "Takes what lies between a convolution and its BatchNorm: folded, it is another function"
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.last = nn.Linear(288, 10)
        nn.init.uniform_(self.body[1].weight, 2, 9)

    def forward(self, x):
        tap = self.body[0](x)
        return self.last((self.body[2](self.body[1](tap)) + tap).flatten(1))


@pytest.mark.parametrize('make', [Viewed, Tapped])
def test_a_layout_or_a_folding_that_a_network_does_not_bear(make):
    torch.manual_seed(0)
    model = make().eval()
    data = images_for(model)
    with torch.no_grad():
        logits, found = (f(to_float(data.images)) for f in (
            model, search_copy(model, to_float(data.images), 'bf16')))
    assert (logits - found).abs().max() < .05*logits.abs().max()
    assert evaluate(model, data, 'pgd-2', search='bf16', **EPS).record['search'] == 'bf16'


class Halved(nn.Module):
    "Another function in bf16"
    def __init__(self):
        super().__init__()
        self.inner = tiny()

    def forward(self, x):
        z = self.inner(x)
        return z if self.inner[0].weight.dtype == torch.float32 else z/2


def test_a_copy_that_is_another_function_is_refused():
    model = Halved()
    with pytest.raises(ValueError, match='a copy of it in bf16 gives logits that are off by 50 %'):
        evaluate(model, images_for(model), 'pgd-2', search='bf16', **EPS)


def test_the_networks_own_faults_are_named_first():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))
        def forward(self, x): raise KeyError('lost')
    with pytest.raises(Exception, match='lost') as caught:
        evaluate(Broken(), images_for(tiny()), 'pgd-2', search='bf16', **EPS)
    assert 'search' not in str(caught.value)


def test_close_logits_stay_apart():
    "Attacks along the boundary find as much: there logits are closer than bf16 tells apart"
    model = load_pretrained('fashion_mini-weat_adv-resnet8')
    data = load_dataset('fashion_mini', 'test')[:24]
    exact, rounded = (evaluate(model, data, 'fab-10', search=search, show=False).correct
                      for search in ('float32', 'bf16'))
    assert torch.equal(exact['fab-10'], rounded['fab-10'])
    assert (exact['clean'] & ~exact['fab-10']).any()


@pytest.mark.parametrize('part', ['apgd-ce', 'apgd-t']) # the others: test_whole_autoattack
def test_passes_of_autoattack(part, monkeypatch):
    "At its full length, of two images that hold"
    monkeypatch.setattr(AutoAttack, '_set_version', whole_version)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    data = images_for(model, 4)[[1, 2]]
    seen = AttackedModel(model, torch.device('cpu'), Progress(1, show=False))
    broken = attack_batch(part, seen, to_float(data.images), data.labels, torch.arange(2),
                          settings=dict(eps=1e-6), seed=0)['broken']
    assert not broken.any() and seen.progress.count == 2*attack_passes('autoattack')[part]


def test_the_network_is_left_as_it_was():
    model = tiny().train()
    before = copy.deepcopy(model.state_dict())
    evaluate(model, images_for(model), ('pgd-2', 'autoattack'), search='bf16', **EPS)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# quick


def test_quick_is_a_fifth_at_most():
    assert sum(attack_passes('quick').values()) <= sum(attack_passes('autoattack').values())/5


class Smooth(nn.Module):
    "A network without a ReLU"
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.SiLU(), nn.Linear(32, 10))

    def forward(self, x): return self.inner(x)


@pytest.mark.parametrize('make', [tiny, Smooth, lambda: torch.jit.script(tiny())],
                         ids=['relu', 'silu', 'scripted'])
def test_quick_takes_any_network(make):
    torch.manual_seed(0)
    model = make()
    data = images_for(model)
    result = evaluate(model, data, 'quick', **{**EPS, 'eps': .1}).record['results'][1]
    assert result['attack'] == 'quick' and result['row'] == 'smooth'
    assert result['accuracy'] < 50 and not result['options']['strict']


def test_quick_follows_gradients_alone():
    "Behind rounded pixels only its starts find something, and a short Square far more"
    model = Rounded(tiny())
    data = images_for(model)
    with pytest.warns(EvaluationWarning, match='zero gradients'):
        correct = robust(model, data, 'quick, square-200', eps=.1)
    assert correct['quick'].sum() > correct['square-200'].sum() + 10


def test_no_relu_is_refused_by_smooth_itself():
    model = Smooth()
    data = images_for(model)
    with pytest.raises(ValueError, match='calls none that can be seen.*smooth.strict=False'):
        attack('smooth', model, to_float(data.images), data.labels, eps=.1)
    a, b = (attack(f'smooth-5({how})', model, to_float(data.images), data.labels, eps=.1)
            for how in ('strict=False', 'high=0'))
    assert torch.equal(a, b)


def test_quick_is_no_row_and_takes_no_options():
    assert parse_attack('quick').name == 'quick'
    with pytest.raises(ValueError, match='quick by itself, or smooth with steps and options'):
        parse_attack('quick-50')


# the order of targets


def test_the_nearest_target_of_a_linear_network():
    "Exact there: the class whose boundary is nearest in ℓ∞, which is not the likeliest"
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[0., 0, 0, 0], [.1, 0, 0, 0], [4, 4, 4, 4]]))
        model[1].bias.copy_(torch.tensor([9., 8.5, 0.]))
    x, y = torch.full((1, 1, 2, 2), .5), torch.tensor([0]) # margins: .45 of slope .1, 1 of 16
    def found(eps, **options):
        x_adv = smooth(model, x, y, eps=eps, targets=1, high=0, **options)
        return bool(model(x_adv).argmax(1) != y)
    assert found(.07, order='nearest') and not found(.07, order='likeliest')
    assert found(.07) == found(.07, order='likeliest')
    assert not found(.06, order='nearest') # 1/16 = .0625


@pytest.mark.parametrize('name, value', [
    ('order', 'closest'), ('order', ''), ('order', None), ('order', 3), ('strict', 'no'),
    ('strict', None), ('strict', 2)])
def test_an_option_that_there_is_not(name, value):
    model = tiny()
    data = images_for(model)
    with pytest.raises(ValueError, match=name):
        smooth(model, to_float(data.images), data.labels, eps=.1, **{name: value})
