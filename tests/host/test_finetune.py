"""Label-free distillation of a compressed network: its gradient, what it keeps fixed, and when it is kept."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import small_nets as small
import torch
from torch.nn import functional as F

from edgesolve.host import finetune as module
from edgesolve.host.compress import compress
from edgesolve.host.errors import ModelError
from edgesolve.host.finetune import FinetuneOptions, chains, finetune
from edgesolve.host.fit import FitOptions
from edgesolve.host.network import trace
from edgesolve.host.plan import Candidate, Plan
from edgesolve.host.splice import Compressed, Dense, Factored

QUICK = FinetuneOptions(epochs=3, optimiser="adam")


@cache
def squeezed():
    """(network, compressed module) at low rank, with identity blocks."""
    network = small.made("small")[1]
    walk = small.walk(network, 24)
    chosen = {s.node: candidate(s) for s in walk.found}
    return network, compress(
        walk, Plan(chosen, "params", 0.0, None), {}, None, FitOptions(1)
    ).module


def candidate(site):
    T, c, kh, kw = site.shape
    if kh * kw == 1:
        return Candidate("lowrank", (max(1, min(T, c) // 2),), 0, 0, 0.0)
    return Candidate("tucker2", (max(1, T // 3), max(1, c // 3)), 0, 0, 0.0)


def logits_of(network, frames):
    with torch.no_grad():
        return network(small.PLAIN(torch.from_numpy(frames)))


def divergence_of(network, made, frames):
    a, b = logits_of(network.run, frames).double(), logits_of(made, frames).double()
    return float(F.kl_div(b.log_softmax(1), a.softmax(1), reduction="batchmean"))


@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
def test_it_comes_nearer_to_the_original(optimiser):
    network, made = squeezed()
    x, held = small.images(150), small.images(80, seed=3)
    options = FinetuneOptions(
        epochs=3, lr=2e-3 if optimiser == "adam" else 1e-2, optimiser=optimiser
    )
    before = divergence_of(network, made, held)
    state = {k: v.clone() for k, v in made.state_dict().items()}
    found = finetune(made, small.PLAIN, x, held, options)
    assert found.accepted and len(found.loss) == 3 and len(found.divergence) == 4
    assert found.divergence[0] == pytest.approx(before, rel=1e-4)
    after = divergence_of(network, found.module, held)
    assert after == pytest.approx(found.divergence[found.epoch], rel=1e-4)
    assert found.agreement[found.epoch] >= found.agreement[0] and after < 0.95 * before
    assert all(torch.equal(v, made.state_dict()[k]) for k, v in state.items())
    agreed = logits_of(network.run, held).argmax(1) == logits_of(found.module, held).argmax(1)
    assert found.agreement[found.epoch] == pytest.approx(float(agreed.double().mean()))


def test_the_loss_and_its_gradient_are_torchs():
    """By finite differences of torch's own KL, at a temperature and with a feature."""
    network, made = squeezed()
    layer = next(n.name for n in network.nodes if "relu" in n.name)
    options = FinetuneOptions(temperature=2.0, features=0.3, at=(layer,))
    student = module._Student(made)
    frames = small.PLAIN(torch.from_numpy(small.images(10)))
    loss = module._loss(student, frames, options)
    seen = []
    with torch.no_grad():
        for run in (student.original, student):
            kept = {}
            logits = run(frames, lambda n, v, a, kept=kept: kept.update({n.name: v}))
            seen.append((logits, kept[layer]))
    (t, ft), (s, fs) = seen
    kl = 4.0 * F.kl_div((s / 2).log_softmax(1), (t / 2).softmax(1), reduction="batchmean")
    expected = kl + 0.3 * F.mse_loss(fs, ft) / ft.var()
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-4)
    value = student.parameters[0]
    (gradient,) = torch.autograd.grad(loss, [value])
    along = torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        steps = []
        start = value.clone()
        for h in (1e-3, -1e-3):
            value.copy_(start + h * along)
            steps.append(float(module._loss(student, frames, options)))
        value.copy_(start)
    numeric = (steps[0] - steps[1]) / 2e-3
    assert float((gradient * along).sum()) == pytest.approx(numeric, rel=1e-1)  # single precision
    assert abs(numeric) > 1e-4


def test_identity_blocks_stay_and_chains_are_what_runs():
    _, made = squeezed()
    found = finetune(made, small.PLAIN, small.images(64), small.images(40, 3), QUICK)
    moved = 0
    for node, place in found.module.places.items():
        assert not any(b.requires_grad for b in place.buffers())
        if not isinstance(place, Factored):
            continue
        old = made.places[node].chain
        assert place.chain.n_params == old.n_params and place.chain.ranks == old.ranks
        for i, (f, g) in enumerate(zip(place.chain.factors, old.factors, strict=True)):
            assert f.pivots == g.pivots  # Factor itself refuses pivots without their identity
            weight = getattr(place, f"weight_{i}").numpy()
            np.testing.assert_array_equal(weight, place.site.laid_out(f.weight).astype(np.float32))
        moved += not np.allclose(place.chain.full(), old.full(), rtol=1e-3)
    assert moved > 3
    assert any(f.pivots for p in found.module.places.values() for f in p.chain.factors)
    assert set(chains(found.module)) == set(found.module.places)
    x = small.images(5, 9)
    again = trace(found.module, small.IMAGE)
    torch.testing.assert_close(logits_of(again.run, x), logits_of(found.module, x))


def test_without_the_mask_an_identity_block_is_lost(monkeypatch):
    monkeypatch.setattr(module._Student, "mask_gradients", lambda self: None)
    _, made = squeezed()
    with pytest.raises(ValueError, match="the weight at the pivots must be the identity"):
        finetune(made, small.PLAIN, small.images(64), small.images(40, 3), QUICK)


def test_what_does_not_help_changes_nothing():
    _, made = squeezed()
    wild = FinetuneOptions(epochs=2, lr=10.0, optimiser="sgd")
    found = finetune(made, small.PLAIN, small.images(64), small.images(40, 3), wild)
    assert not found.accepted and found.module is made and found.epoch == 0


def test_a_lower_mean_with_fewer_right_answers_is_not_kept(monkeypatch):
    """Judged as (1, .9), then (.5, .8), (.9, .9) and (.8, .9): the first is not taken, the last two are."""
    _, made = squeezed()
    answers = iter([(1.0, 0.9), (0.5, 0.8), (0.9, 0.9), (0.8, 0.9), (np.nan, 1.0)])
    monkeypatch.setattr(module, "_judged", lambda *args: next(answers))
    options = FinetuneOptions(epochs=4, optimiser="adam")
    assert finetune(made, small.PLAIN, small.images(64), small.images(8), options).epoch == 3


def test_dense_layers_take_part():
    model = small.seeded(lambda: small.Odd(c=8, out=8, groups=8, padding=1))
    network = trace(model, small.IMAGE)
    walk = small.walk(network, 24)
    made = Compressed(network, walk.found, {})
    with torch.no_grad():
        for place in made.places.values():
            place.bias += 0.2
    found = finetune(made, small.PLAIN, small.images(64), small.images(40, 3), QUICK)
    dense = [p for p in found.module.places.values() if isinstance(p, Dense)]
    assert found.accepted and len(dense) == 3
    for place in dense:
        assert not torch.equal(place.weight, made.places[place.site.node].weight)


def test_the_same_bytes_twice_and_other_bytes_for_another_seed():
    _, made = squeezed()
    x, held = small.images(150), small.images(80, 3)
    options = [FinetuneOptions(epochs=2, optimiser="adam", seed=s) for s in (0, 0, 1)]
    a, b, c = (finetune(made, small.PLAIN, x, held, o).module.state_dict() for o in options)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not all(torch.equal(a[k], c[k]) for k in a)
    assert not all(torch.equal(a[k], v) for k, v in made.state_dict().items())


def test_moved_frames_are_mirrored_or_shifted():
    frames = small.PLAIN(torch.from_numpy(small.images(40)))
    draw = np.random.default_rng(0)
    assert torch.equal(module._moved(frames, FinetuneOptions(), draw), frames)
    flipped = module._moved(frames, FinetuneOptions(flip=True), draw)
    same = [torch.equal(a, b) for a, b in zip(flipped, frames, strict=True)]
    turned = [torch.equal(a, b.flip(2)) for a, b in zip(flipped, frames, strict=True)]
    assert all(a != b for a, b in zip(same, turned, strict=True)) and 5 < sum(same) < 35
    shifted = module._moved(frames, FinetuneOptions(shift=2), draw)
    inner = [f[:, 2:-2, 2:-2] for f in frames]
    windows = shifted.unfold(2, 6, 1).unfold(3, 4, 1)
    for own, middle in zip(windows, inner, strict=True):
        assert (own == middle[:, None, None]).all((0, 3, 4)).any()


def test_it_ends_in_time():
    _, made = squeezed()
    seen = []
    options = FinetuneOptions(epochs=10_000, seconds=0.5)
    found = finetune(
        made, small.PLAIN, small.images(8), small.images(8, 3), options, lambda d, t: seen.append(d)
    )
    assert 1 <= len(found.loss) < 10_000 and seen == list(range(1, len(found.loss) + 1))


def test_bad_input_is_named():
    _, made = squeezed()
    with pytest.raises(ModelError, match="nowhere: no such call site"):
        finetune(
            made, small.PLAIN, small.images(8), small.images(8), FinetuneOptions(at=("nowhere",))
        )
    for wrong in ({"epochs": 0}, {"lr": -1.0}, {"temperature": 0.0}, {"optimiser": "lbfgs"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            FinetuneOptions(**wrong)
    with pytest.raises(ValueError, match="name them in `at`"):
        FinetuneOptions(features=1.0)
