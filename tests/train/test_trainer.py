"""The training loop: it trains the diffusion view alone, and is a function of its arguments."""

import dataclasses
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from orthrus_jax.model import ar_segment, params
from tests.support.compare import flat
from tests.support.training import CONFIG, VOCAB, made_rows, random_trees
from train.data import Loader
from train.objective import Objective
from train.trainer import (
    IN_FLIGHT,
    Interrupted,
    NotFiniteError,
    adamw,
    fit,
    init_state,
    step_key,
    to_devices,
    train_step,
)

RECIPE = types.SimpleNamespace(
    steps=30, accumulate=1, seed=1, log_every=10, eval_every=20, save_every=10
)


def run(evaluate=lambda diffusion: {"acceptance_length": 0.0}, **options):
    model, frozen, diffusion = random_trees()
    optimizer, log = adamw(3e-3, RECIPE.steps, 0.1), []
    state = fit(
        RECIPE,
        Objective(5),
        model,
        frozen,
        init_state(diffusion, optimizer),
        optimizer,
        Loader(made_rows(rows=8), 4, 0),
        log.append,
        evaluate,
        **options,
    )
    return model, frozen, diffusion, state.diffusion, log


def test_training_lowers_the_loss_and_logs_every_tenth_step():
    *_, log = run()
    assert [record["step"] for record in log] == [1, 10, 20, 30]
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    assert len(log[0]["kl"]) == len(log[0]["agreement"]) == len(log[0]["overlap"]) == 4


def test_decoding_is_measured_periodically_and_at_the_end():
    seen = []

    def evaluate(diffusion):
        seen.append(jax.tree.map(np.array, diffusion))
        return {"acceptance_length": float(len(seen))}

    *_, log = run(evaluate)
    assert [r.get("acceptance_length") for r in log] == [None, None, 1.0, 2.0]
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, seen), strict=True))


def test_frozen_view_is_bit_identical_after_training():
    tokens = jnp.arange(12)[None] % 40
    logits = lambda model, frozen, diffusion: np.asarray(
        model.logits(
            frozen,
            model.forward(
                params.merge(frozen, diffusion), [ar_segment(tokens, jnp.zeros(1, jnp.int32))], None
            )[0][0],
        )
    )
    model, frozen, diffusion, trained, _ = run()
    untouched = random_trees()[1]
    for ours, theirs in zip(jax.tree.leaves(frozen), jax.tree.leaves(untouched), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(logits(model, frozen, diffusion), logits(model, frozen, trained))
    changed = [
        bool((a != b).any())
        for a, b in zip(jax.tree.leaves(diffusion), jax.tree.leaves(trained), strict=True)
    ]
    assert all(changed)


def test_optimizer_state_excludes_the_frozen_tree():
    _, frozen, diffusion = random_trees()
    state = adamw(1e-3, 10, 0.1).init(diffusion)
    held = sum(x.size for x in jax.tree.leaves(state) if x.ndim)
    assert held == 2 * params.count(diffusion)  # first and second moments
    assert held < params.count(frozen) + params.count(diffusion)


def test_runs_of_one_seed_give_the_same_bits_and_of_another_do_not():
    model, frozen, diffusion = random_trees()
    optimizer = adamw(1e-3, 10, 0.1)

    def train(seed):
        state = init_state(diffusion, optimizer)
        for rows in itertools.islice(Loader(made_rows(rows=8), 4, 0), 3):
            state, _ = train_step(
                state,
                frozen,
                to_devices(rows, 1, model),
                jnp.uint32(seed),
                model=model,
                optimizer=optimizer,
                objective=Objective(5),
            )
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.diffusion)])

    np.testing.assert_array_equal(train(0), train(0))
    assert (train(0) != train(1)).any()


def test_schedule_warms_up_and_ends_at_a_tenth():
    optimizer = adamw(1.0, 100, 0.05)
    weights = {"w": jnp.ones(3)}
    state = optimizer.init(weights)
    sizes = []
    for _ in range(101):
        updates, state = optimizer.update({"w": jnp.ones(3)}, state, weights)
        sizes.append(float(optax.tree.norm(updates)) / 3**0.5)
    # A constant gradient makes Adam's step the learning rate itself.
    assert sizes[0] == 0.0
    np.testing.assert_allclose(sizes[5], 1.0, rtol=1e-3)
    np.testing.assert_allclose(sizes[100], 0.1, rtol=1e-3)
    assert sizes[1:6] == sorted(sizes[1:6])
    assert sizes[5:] == sorted(sizes[5:], reverse=True)


def test_untrained_output_projection_stays_in_the_frozen_tree():
    model, frozen, diffusion = random_trees()
    whole = params.merge(frozen, diffusion)
    frozen, diffusion = params.split(whole, freeze=("o_proj",))
    assert not [path for path in flat(diffusion) if "o_proj" in path]
    assert len(flat(frozen)) + len(flat(diffusion)) == len(flat(whole))
    optimizer = adamw(3e-3, 10, 0.1)
    state, metrics = train_step(
        init_state(diffusion, optimizer),
        frozen,
        to_devices(next(Loader(made_rows(rows=8), 4, 0)), 1, model),
        jnp.uint32(0),
        model=model,
        optimizer=optimizer,
        objective=Objective(5),
    )
    assert flat(state.diffusion).keys() == flat(diffusion).keys()
    assert float(metrics["grad_norm"]) > 0


class RecordingSaver:
    """A saver that records its calls."""

    def __init__(self):
        self.steps, self.places, self.best = [], [], []

    def save(self, state, data):
        self.steps.append(int(state.step))
        self.places.append(data)

    def save_best(self, state, value):
        self.best.append((int(state.step), value))


def test_state_is_saved_periodically_and_on_interruption():
    saver = RecordingSaver()
    run(saver=saver)
    assert saver.steps == [10, 20, 30]
    assert [step for step, _ in saver.best] == [20, 30]
    calls, saver = itertools.count(1), RecordingSaver()
    with pytest.raises(Interrupted):
        run(saver=saver, stop=lambda step: next(calls) == 7)
    assert saver.steps == [7]
    assert saver.places[0] != Loader(made_rows(rows=8), 4, 0).state()


@pytest.fixture
def poisoned():
    """Batches of which the fifth makes the loss NaN: its tokens read a NaN row of the embedding."""
    model, frozen, diffusion = random_trees(
        config=dataclasses.replace(CONFIG, tie_word_embeddings=False)
    )
    embedding = frozen["embed_tokens"]["embedding"].at[VOCAB - 2].set(jnp.nan)
    frozen = frozen | {"embed_tokens": {"embedding": embedding}}
    clean = made_rows(rows=8)
    clean = clean._replace(tokens=np.minimum(clean.tokens, VOCAB - 3))

    class Poisoned(Loader):
        taken = 0

        def __next__(self):
            self.taken += 1
            rows = super().__next__()
            return rows._replace(tokens=rows.tokens * 0 + VOCAB - 2) if self.taken == 5 else rows

    return model, frozen, diffusion, Poisoned(clean, 4, 0)


@pytest.mark.parametrize("every", [1, 3, 100])
def test_loss_that_is_not_finite_ends_the_run_and_is_never_saved(poisoned, every):
    """However rarely a step is logged or saved, the message names the first bad one."""
    model, frozen, diffusion, batches = poisoned
    recipe = types.SimpleNamespace(
        **{**vars(RECIPE), "log_every": every, "eval_every": 100, "save_every": every}
    )
    optimizer, saver, log = adamw(3e-3, 30, 0.1), RecordingSaver(), []
    with pytest.raises(NotFiniteError, match=r"at step 5,.*lower train\.learning_rate"):
        fit(
            recipe,
            Objective(5),
            model,
            frozen,
            init_state(diffusion, optimizer),
            optimizer,
            batches,
            log.append,
            lambda diffusion: {},
            saver=saver,
        )
    assert batches.taken <= 5 + IN_FLIGHT
    assert saver.steps == [step for step in range(1, 5) if step % every == 0]
    assert all(np.isfinite(record["loss"]) for record in log)


def test_weights_that_a_last_update_breaks_are_not_saved():
    """The loss of the last step is finite; the weights after it are not."""
    model, frozen, diffusion = random_trees()
    saver = RecordingSaver()
    explode = optax.GradientTransformation(
        lambda weights: None,
        lambda gradient, state, weights: (jax.tree.map(lambda g: g * jnp.inf, gradient), state),
    )
    recipe = types.SimpleNamespace(**{**vars(RECIPE), "steps": 1})
    with pytest.raises(NotFiniteError, match="at step 1,"):
        fit(
            recipe,
            Objective(5),
            model,
            frozen,
            init_state(diffusion, explode),
            explode,
            Loader(made_rows(rows=8), 4, 0),
            lambda record: None,
            lambda diffusion: {},
            saver=saver,
        )
    assert saver.steps == saver.best == []


def test_keys_do_not_depend_on_the_default_implementation():
    draw = lambda: jax.random.key_data(step_key(jnp.uint32(3), jnp.int32(7))).tolist()
    expected = draw()
    with jax.default_prng_impl("rbg"):
        assert draw() == expected
