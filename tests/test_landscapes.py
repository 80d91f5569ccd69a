"""What guards weat_nb.landscapes and weat_nb.claims beyond their pages: brute-force counts, attacks
called directly, kept batches, verdicts that can fail."""
import io

import matplotlib
import pytest
import torch

from weat_nb.attacks import attack
from weat_nb.claims import (attack_claims, auroc, directions, overlap, robustness_claim,
                            steps_claims, valley)
from weat_nb.data import batches, load_dataset
from weat_nb.energy import delta_energy
from weat_nb.frozen import FrozenCopy
from weat_nb.landscapes import (_apart, attack_energies, attack_table, between, energy_record,
                                fixed_steps, plot_attack_histograms, plot_directions, plot_steps,
                                plot_violins, shift, steps_energies, tidy_energies)
from weat_nb.models import create_model
from weat_nb.plots import axes, short_name

matplotlib.use('agg')
EPS = .1


@pytest.fixture(scope='module')
def model(): return create_model('resnet8', 10, in_channels=1, image_size=28, seed=0)


@pytest.fixture(scope='module')
def data(): return load_dataset('fashion_mini', 'test')[:10]


def record(n=400, move=0., joint=0., correct=0., seed=0):
    "A made-up record: natural energies around -10, attacked ones moved by so much"
    gen = torch.Generator().manual_seed(seed)
    nat, adv = (torch.randn(n, generator=gen) - 10 for _ in range(2))
    out = dict(correct_nat=torch.ones(n), correct_adv=(torch.arange(n) < correct*n).float(),
               energy_nat=nat, energy_adv=adv + move,
               joint_nat=nat + .1, joint_adv=adv + .1 + joint)
    return {**out, **{f'delta_{k}': out[f'{k}_nat'] - out[f'{k}_adv'] for k in ('energy', 'joint')}}


@pytest.mark.parametrize('n, m, levels', [(1, 1, 2), (3, 50, 4), (50, 3, 1), (60, 70, 1000)])
def test_auroc_counts_pairs(n, m, levels):
    gen = torch.Generator().manual_seed(n)
    a, b = (torch.randint(levels, (k,), generator=gen).float() for k in (n, m))
    count = sum((p < q) + .5*(p == q) for p in a.tolist() for q in b.tolist())
    assert auroc(a, b) == pytest.approx(count/(n*m), abs=1e-12)
    assert auroc(b, a) == pytest.approx(1 - count/(n*m), abs=1e-12)
    # only the order counts
    assert auroc((a/99).exp(), (b/99).exp()) == pytest.approx(auroc(a, b), abs=1e-12)


def test_auroc_of_nothing():
    with pytest.raises(ValueError, match='two groups, given 0 and 3 values'):
        auroc(torch.empty(0), torch.ones(3))
    with pytest.raises(ValueError, match='1 of them NaN'): # it would be the greatest
        auroc(torch.tensor([0., float('nan')]), torch.ones(3))


@pytest.mark.parametrize('seed', range(20))
def test_one_mode_is_not_two(seed):
    gen = torch.Generator().manual_seed(seed)
    for values in (torch.randn(100, generator=gen), torch.rand(100, generator=gen),
                   torch.randn(100, generator=gen).exp()):
        assert valley(values)[1] > .5


@pytest.mark.parametrize('share', [.2, .5, .8])
def test_two_modes_are_found(share):
    values = torch.randn(200, generator=torch.Generator().manual_seed(0))
    values[:round(200*share)] -= 8
    where, depth = valley(values)
    assert -6 < where < -2 and depth < .25
    assert ((values < where).double().mean() - share).abs() < .01


def test_a_mode_of_a_few_images_does_not_count():
    values = torch.randn(200, generator=torch.Generator().manual_seed(0))
    values[:6] -= 20
    assert valley(values)[1] > .5


@pytest.mark.parametrize('name, options', [
    ('pgd', dict(steps=2)), ('trades', dict(steps=2)),
    ('cw-l2', dict(steps=3, initial_const=1., binary_search_steps=1))])
def test_energies_are_those_of_the_attack_called_directly(model, data, name, options):
    found, net, start = (
        attack_energies(model, data, name, eps=EPS, seed=5, batch_size=4, **options),
        FrozenCopy(model), 0)
    for x, y in batches(data, 4):
        x_adv = attack(name, net, x, y, eps=EPS, seed=5 + start, **options)
        with torch.no_grad(): z, z_adv = model.eval()(x), model(x_adv)
        part = slice(start, start + len(x))
        torch.testing.assert_close(
            found['delta_energy'][part], delta_energy(z, z_adv), atol=1e-5, rtol=0)
        torch.testing.assert_close(
            found['delta_joint'][part], delta_energy(z, z_adv, y), atol=1e-5, rtol=0)
        start += len(x)
    assert start == len(found['energy_nat']) == 10


@pytest.mark.parametrize('name', fixed_steps())
def test_the_last_step_is_the_registry_s_attack(model, data, name):
    study = steps_energies(
        model, data, name, (0, 1, 3), eps=EPS, step_size=.03, seed=2, batch_size=10)
    direct = attack_energies(
        model, data, name, eps=EPS, seed=2, batch_size=10, steps=3, step_size=.03)
    assert study['energy'].shape == (3, 10)
    for k, v in between(study).items(): assert torch.equal(v, direct[k]), k


def test_the_model_is_left_as_it_was(model, data):
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    attack_energies(model, data, 'pgd', eps=EPS, steps=1)
    steps_energies(model, data, 'trades', (0, 1), eps=EPS, step_size=.03)
    assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())
    assert (all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
            and torch.equal(torch.get_rng_state(), state))


def test_kept_batches_belong_to_weights_images_and_options(model, data, tmp_path):
    options = dict(eps=EPS, steps=1, batch_size=5, folder=tmp_path/'pgd')
    first = attack_energies(model, data[:5], 'pgd', **options)
    longer = attack_energies(model, data, 'pgd', **options) # adds a batch, keeps the first
    assert (all(torch.equal(longer[k][:5], first[k]) for k in first)
            and len(list((tmp_path/'pgd').glob('*.safetensors'))) == 2)
    other, shifted = (
        create_model('resnet8', 10, in_channels=1, image_size=28, seed=1),
        create_model('resnet8', 10, in_channels=1, image_size=28, mean=[.5], std=[1.]))
    shifted.load_state_dict(model.state_dict()) # no checkpoint holds the mean of the pixels
    for change, message in [(dict(model=other), 'weights'), (dict(model=shifted), 'weights'),
                            (dict(data=data[torch.arange(9, -1, -1)]), 'other images'),
                            (dict(eps=.2), 'eps is 0.1 there and 0.2 here'),
                            (dict(steps=2), 'options'), (dict(seed=1), 'seed is 0 there')]:
        given = {**dict(model=model, data=data), **options, **change}
        with pytest.raises(ValueError, match=f'{message}.*another folder'):
            attack_energies(given.pop('model'), given.pop('data'), 'pgd', **given)


def test_a_damaged_batch_is_refused(model, data, tmp_path):
    options = dict(eps=EPS, steps=1, folder=tmp_path)
    attack_energies(model, data, 'pgd', **options)
    file, = tmp_path.glob('*.safetensors')
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=file.name): attack_energies(model, data, 'pgd', **options)


def test_each_batch_has_its_own_seed(model, data):
    "That of the run, and the number of its first image: an image's energy tells its batch"
    one = attack_energies(model, data[:3], 'pgd', eps=EPS, steps=1, seed=7, batch_size=1)
    for i in range(3):
        alone = attack_energies(model, data[[i]], 'pgd', eps=EPS, steps=1, seed=7 + i)
        for k, v in one.items(): assert torch.equal(v[i:i + 1], alone[k])


def test_batches_that_do_not_fit(data, tmp_path):
    "Are halved from the beginning; a size that was asked for is not changed in silence"
    class Small(torch.nn.Module):
        net = torch.nn.Linear(784, 10)
        def forward(self, x):
            if len(x) > 3: raise torch.OutOfMemoryError('out of memory')
            sizes.append(len(x))
            return self.net(x.flatten(1))
    how = dict(name='pgd', eps=EPS, steps=1)
    for done in ([3, 1], []): # the second finds what the first has kept
        sizes = []
        found = attack_energies(Small(), data[:10], **how, folder=tmp_path/'kept')
        assert [*dict.fromkeys(sizes)] == done
    whole = attack_energies(Small(), data[:10], **how, batch_size=3)
    assert all(torch.equal(v, found[k]) for k, v in whole.items())
    with pytest.raises(MemoryError, match='a batch of 4 images .* memory of cpu: .*or None'):
        attack_energies(Small(), data[:10], **how, batch_size=4)
    with pytest.raises(ValueError, match='batch_size = 0'):
        attack_energies(Small(), data[:10], **how, batch_size=0)


@pytest.mark.parametrize('counts', [(), (2, 1), (1, 1), (-1, 2)])
def test_wrong_counts(model, data, counts):
    with pytest.raises(ValueError, match='ascending'):
        steps_energies(model, data, 'pgd', counts, eps=EPS, step_size=.03)


def test_tidy_rows(model, data):
    m = attack_energies(model, data, 'pgd', eps=EPS, steps=1)
    rows = tidy_energies({('net', 'pgd'): m, ('net', 'again'): m})
    assert len(rows) == 20 and rows[13] == {**rows[3], 'attack': 'again'} and rows[3]['image'] == 3
    assert all(abs(r['energy_nat'] - r['energy_adv'] - r['delta_energy']) < 2e-5
               and r['joint_adv'] >= r['energy_adv'] - 1e-5 for r in rows)
    table, = attack_table({('net', 'pgd'): m})
    assert (table['AUROC of E(x)'] == auroc(m['energy_adv'], m['energy_nat'])
            and table['correct (%)'] == 10*m['correct_adv'].sum().item())


def test_shift_is_negative_to_the_left():
    mean, error = shift(record(move=-3))
    assert mean == pytest.approx(-3, abs=.3) and error == pytest.approx(2**.5/20, rel=.15)


def verdicts(rows): return {r['claim']: r['verdict'] for r in rows}


@pytest.mark.slow
def test_claims_are_supported_where_they_are_true_and_not_where_they_are_false():
    bimodal = record(move=-3, correct=.3)
    bimodal['joint_adv'] = torch.where(
        bimodal['correct_adv'] > 0, bimodal['joint_nat'] - 3, bimodal['joint_nat'] + 20)
    bimodal['delta_joint'] = bimodal['joint_nat'] - bimodal['joint_adv']
    true = attack_claims({
        'pgd': record(move=-3, joint=20), 'trades': bimodal, 'pgd-t': record(move=3, joint=9),
        'pgd-dlr': record(move=-1, joint=9), 'fab': record(move=3, joint=5),
        'cw-l2': record(move=.3, joint=1)})
    assert len(true) == 13 and set(verdicts(true).values()) == {'supported'}
    text, = [r['ours'] for r in true if 'two modes' in r['claim']]
    assert ('left of it 30 % of the images, of which the network classifies 100 % correctly, '
            'right of it 0 %') in text
    false = attack_claims({
        'pgd': bimodal, 'trades': record(move=3, joint=-5), 'pgd-t': record(move=-3),
        'pgd-dlr': record(move=1), 'fab': record(move=-3, joint=-5),
        'cw-l2': record(move=-6, joint=-1)})
    assert verdicts(false) == {
        **dict.fromkeys(verdicts(true), 'not supported'), 'PGD lowers E(x)': 'supported'}


def test_claims_of_attacks_that_were_not_run_are_not_made():
    assert len(attack_claims({'square': record()})) == 2 # where it moves E(x), and E(x, y)


def test_a_robust_network_is_not_what_the_claims_are_about():
    assert attack_claims({'pgd': record(correct=.3), 'fab': record(correct=.2)}) == []
    assert attack_claims({'pgd': record(correct=.3), 'fab': record(correct=.05)})
    # without a radius every network is defeated
    assert attack_claims({'pgd': record(correct=.3), 'cw-l2': record()}) == []
    assert attack_claims({'cw-l2': record()})


def test_no_effect_is_inconclusive():
    rows = attack_claims({'pgd': {**record(n=30), 'correct_adv': torch.zeros(30)}})
    assert (verdicts(rows)['PGD lowers E(x)']
            == verdicts(rows)['Fewer than 1 % are robust under PGD'] == 'inconclusive')


def test_overlap_of_normal_samples():
    a, b = torch.randn(2, 20_000, generator=torch.Generator().manual_seed(0)).double()
    assert overlap(a, b + 1, -6, 7) == pytest.approx(.617, abs=.02) # 2 Φ(−½)
    assert overlap(a, b + 1, -6, 7) == overlap(b + 1, a, -6, 7)


def study(*means):
    noise = .01*torch.randn(4, generator=torch.Generator().manual_seed(0))
    return {k: sign*torch.tensor(means)[:, None] + torch.arange(len(means))[:, None]*noise
            for k, sign in (('energy', 1), ('joint', -1))} | {'correct': torch.ones(len(means), 4)}


@pytest.mark.parametrize('means, found', [
    ((0., 1, -2, -3), 'supported'), ((0., -1, 2, 1), 'not supported'),
    ((0., 1, 2, 1), 'inconclusive')])
def test_steps_claims(means, found):
    three = ({(f'a-{c}', 'pgd'): study(0., 1, -2, -3) for c in 'bc'}
             | {('a-d', 'pgd'): study(*means)})
    rows = steps_claims(three, (0, 1, 2, 3))
    assert [r['verdict'] for r in rows] == [found]*2 and rows[0]['claim'] == (
        'E(x) falls from step 1 of PGD to the last, whatever the depth')
    assert ('nats; d, the least' in rows[0]['ours']) == (found != 'supported')
    assert [r['verdict'] for r in steps_claims(
        {('a-b', 'pgd'): study(0., 1, -2, -3)}, (0, 1, 2, 3))] == ['not tested at scale']*2


def test_claims_count_every_model():
    "Checkpoints of one folder have one short name"
    rows = steps_claims({(f'runs/a/{n}.safetensors', 'pgd'): study(0., s, -2*s, -3*s)
                         for n, s in (('best', 1), ('last', -1), ('other', 1))}, (0, 1, 2, 3))
    assert [r['verdict'] for r in rows] == ['not supported']*2 and (
        'in 4 of 6 intervals from step 1 on; from 0 to 1 in 1 of 3 networks' in rows[0]['ours'])


def test_an_attack_that_cannot_move_is_no_robustness(data):
    "Finite logits, but no slope: the images would stay where they are"
    class Root(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(784, 10)
        def forward(self, x):
            return self.linear(x.flatten(1)) + (0*x).sum((1, 2, 3)).sqrt()[:, None]
    with pytest.raises(FloatingPointError, match='NaN or infinite in step 0 of 5'):
        steps_energies(Root(), data, 'pgd', (0, 1, 5), eps=EPS, step_size=.02)


def test_robustness_claim():
    gen = torch.Generator().manual_seed(0)
    def model(robust, size):
        return {'correct_adv': (torch.arange(400) < 400*robust).float(),
                **{f'delta_{k}': size + .1*torch.randn(400, generator=gen)
                   for k in ('energy', 'joint')}}
    falling = {name: model(.1*i, 6. - i) for i, name in enumerate('abcde', 1)}
    assert [r['verdict'] for r in robustness_claim(falling)] == ['supported']*2
    assert [r['verdict'] for r in robustness_claim(
        {name: model(.1*i, 1. + i) for i, name in enumerate('abcde', 1)})] == ['not supported']*2
    assert [r['verdict'] for r in robustness_claim(
        {name: falling[name] for name in 'ab'})] == ['not tested at scale']*2
    # the changes fall with the scale of the logits, and not in units of it
    units = {name: {**m, **{f'{k}_nat': (6. - i)**2*torch.randn(400, generator=gen)
                            for k in ('energy', 'joint')}}
             for i, (name, m) in enumerate(falling.items(), 1)}
    assert [r['verdict'] for r in robustness_claim(units)] == ['supported']*2
    assert [r['verdict'] for r in robustness_claim(units, scaled=True)] == ['not supported']*2


def test_histograms_say_what_is_left():
    fig = plot_attack_histograms({
        'pgd': record(move=-3), 'trades': record(move=-3, correct=.25),
        'fab': record(), 'square': record(), 'cw-l2': record()})
    titles = [ax.get_title() for ax in fig.axes]
    assert len(fig.axes) == 16 and titles[1] == titles[9] == 'TRADES (KL), 25.0 % correct'
    assert [t for t in titles if not t] == ['']*6 # 5 attacks in rows of 4, twice
    drawn = [[p.get_height() for p in c] for c in fig.axes[0].containers]
    assert [sum(d) for d in drawn] == [400, 400] # no image lies outside the range


def test_steps_and_violins():
    ax = axes()[1][0]
    plot_steps({'one': {**study(0., -1., -2.), 'correct': torch.tensor([[1., 1], [1, 0], [0, 0]])}},
               (0, 1, 20), 'energy', ax=ax)
    assert ([t.get_text() for t in ax.texts] == ['100', '50', '0']
            and [t.get_text() for t in ax.get_xticklabels()] == ['0', '1', '20'])
    ax = axes()[1][0]
    plot_violins({'d-b': record(correct=.5), 'd-a': record(correct=.1), 'd-c': record(correct=.9)},
                 'energy', ax=ax)
    assert [t.get_text() for t in ax.get_xticklabels()] == ['a\n10.0 %', 'b\n50.0 %', 'c\n90.0 %']


def test_many_networks_fit_into_the_figures():
    "The legend of many lines goes below and has the accuracies; long names break"
    ax = axes()[1][0]
    many = {f'net{i}': {**study(0., -1., -2.), 'correct': torch.tensor([[1., 1], [1, 0], [0, 0]])}
            for i in range(7)}
    plot_steps(many, (0, 1, 20), 'energy', ax=ax)
    assert not ax.texts and ax.get_legend().get_texts()[6].get_text() == 'net6, 100 → 0 %'
    names = ('cifar10-standard-marabou_small', 'cifar10-adv_alt-cnn_a',
             'fashion_mini-weat_adv-resnet8')
    ax = axes()[1][0]
    plot_violins({name: record(correct=.25*i) for i, name in enumerate(names)}, 'energy', ax=ax)
    assert [t.get_text() for t in ax.get_xticklabels()] == [
        'standard\nmarabou\nsmall\n0.0 %', 'adv_alt\ncnn_a\n25.0 %', 'weat_adv\nresnet8\n50.0 %']


def test_scaled_violins_do_not_see_the_scale_of_the_logits():
    small = record(move=-3, correct=.5)
    large = {k: v if k.startswith('correct') else 7*v for k, v in small.items()}
    def heights(scaled):
        ax = axes()[1][0]
        plot_violins({'d-a': small, 'd-b': large}, 'energy', ax=ax, scaled=scaled)
        return [body.get_paths()[0].vertices[:, 1].max() for body in ax.collections[:2]]
    a, b = heights(True)
    assert a == pytest.approx(b) and heights(False)[1] == pytest.approx(7*heights(False)[0])


def test_directions():
    measured = {('d-a', 'pgd'): record(move=-3), ('d-a', 'fab'): record(move=2),
                ('d-b', 'pgd'): record(move=2), ('d-b', 'fab'): record(n=30)}
    by = {key: -m['delta_energy'].double().mean().item() for key, m in measured.items()}
    assert directions(measured) == [
        {'attack': 'PGD', 'expected': 'lowers', 'lowered in (nats)': f"a {by['d-a', 'pgd']:+.2f}",
         'raised in (nats)': f"b {by['d-b', 'pgd']:+.2f}", 'open in (nats)': ''},
        {'attack': 'FAB', 'expected': 'raises', 'lowered in (nats)': '',
         'raised in (nats)': f"a {by['d-a', 'fab']:+.2f}",
         'open in (nats)': f"b {by['d-b', 'fab']:+.2f}"}]
    fig = plot_directions(measured)
    assert [ax.get_title() for ax in fig.axes] == ['a', 'b']
    drawn = [[line.get_xdata()[0] for line in ax.lines if line.get_marker() in '<>']
             for ax in fig.axes]
    assert drawn == [pytest.approx([-measured[f'd-{m}', a]['delta_energy'].mean().item()
                                    for a in ('pgd', 'fab')]) for m in 'ab']


def test_an_attack_that_moves_nothing_has_no_direction():
    "Its images stay where they are: no spread, no interval, and a panel all the same"
    still = record()
    still |= {'energy_adv': still['energy_nat'], 'delta_energy': torch.zeros(400)}
    row, = directions({('d-a', 'square'): still})
    assert row['open in (nats)'].split()[0] == 'a'
    plot_directions({('d-a', 'square'): still}).savefig(io.BytesIO())


def test_labels_are_moved_apart():
    assert _apart([0., 3., .5], 1) == [0., 3., 1.]
    assert _apart([1., 1., 1.], 1) == [1., 2., 3.]


@pytest.mark.parametrize('name, short', [
    ('cifar10-standard-resnet20', 'standard-resnet20'), ('runs/mine/best.safetensors', 'mine'),
    ('robustbench:Rice2020', 'Rice2020')])
def test_short_names(name, short): assert short_name(name) == short


def test_record_on_a_network_known_by_hand():
    net = lambda x: torch.stack([x.sum(dim=(1, 2, 3)), torch.zeros(len(x))], 1)
    x, x_adv, y = torch.full((1, 1, 2, 2), .5), torch.zeros(1, 1, 2, 2), torch.tensor([0])
    r = {k: v.item() for k, v in energy_record(net, x, x_adv, y).items()}
    assert (r['correct_nat'] == 1 and r['joint_nat'] == -2 and r['joint_adv'] == 0
            and r['delta_joint'] == -2)
    assert (r['energy_nat'] == pytest.approx(-2.126928, abs=1e-6)
            and r['energy_adv'] == pytest.approx(-.693147, abs=1e-6))
