"""Masks, loss and decoding: published counts, closed forms, and exact tokens beside a transcription in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvae_jax.generators.draws import example_keys
from eqvae_jax.generators.masking import Decoding, Masking, decode, generate, guided_logits, gumbel_noise, plan

# (settings, tokens) -> tokens that each step fixes, measured on the two released codes
PUBLISHED = {
    (Decoding(8), 256): [1, 18, 26, 32, 38, 43, 48, 50],
    (Decoding(12), 256): [1, 9, 13, 17, 19, 22, 24, 26, 28, 30, 32, 35],
    (Decoding(16), 256): [1, 6, 9, 10, 12, 14, 15, 16, 18, 19, 20, 21, 22, 23, 25, 25],
    (Decoding(15), 1024): [1, 26, 38, 46, 54, 61, 67, 73, 79, 84, 89, 94, 99, 104, 109],
    (Decoding(8, "cosine"), 256): [5, 15, 24, 31, 39, 45, 48, 49],
    (Decoding(12, "cosine"), 256): [3, 6, 11, 15, 18, 22, 26, 27, 31, 31, 33, 33],
}


def keys_of(index, seed=0):
    return example_keys(jax.random.key(seed), jnp.asarray(index))


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: f"{case[0].schedule}-{case[0].steps}-{case[1]}")
def test_steps_fix_the_published_numbers_of_tokens(case):
    assert plan(*case).counts.tolist() == PUBLISHED[case]


def test_the_noise_on_confidences_shrinks_as_published():
    np.testing.assert_allclose(plan(Decoding(4), 256).temperatures, [4.5, 3, 1.5, 0])
    np.testing.assert_allclose(plan(Decoding(8, "cosine"), 256).temperatures[[0, 1, 7]], [3.9375, 3.375, 0])
    assert plan(Decoding(1, guidance=0.0), 256).counts.tolist() == [256]


def test_every_schedule_fixes_every_token_as_torch_counts_them(torch):
    curves = {"root": lambda r: 1 - r**0.5, "linear": lambda r: 1 - r, "square": lambda r: 1 - r**2,
              "arccos": lambda r: torch.arccos(r) / (np.pi / 2)}
    for tokens in (16, 256):
        for schedule, curve in curves.items():
            for steps in (2, 3, 7, 8, 12, 16):
                weights = curve(torch.linspace(1, 0, steps))
                counts = (tokens * weights / weights.sum()).round()
                counts[counts == 0] = 1
                counts[-1] += tokens - counts.sum()
                if counts[-1] >= 1:
                    assert plan(Decoding(steps, schedule), tokens).counts.tolist() == counts.int().tolist()
                else:
                    with pytest.raises(ValueError, match=f"steps is {steps}, .*{schedule}.* {tokens} tokens"):
                        plan(Decoding(steps, schedule), tokens)
            if tokens >= 64:
                assert np.sum(plan(Decoding(9, "cosine"), tokens).counts) == tokens
    assert plan(Decoding(7, "cosine"), 7).counts.tolist() == [1] * 7              # never fewer than one


@pytest.mark.parametrize("schedule, mean, moment", [
    ("arccos", 2 / np.pi, (np.pi - 2) / (np.pi / 2)**2), ("cosine", 2 / np.pi, 1 / 2), ("linear", 1 / 2, 1 / 3),
    ("square", 1 / 3, 1 / 5)])
def test_masks_have_the_moments_of_their_schedule(schedule, mean, moment):
    """Mean and second moment of the ratio, in closed form; tokens are masked independently given it."""
    ids = np.arange(16 * 16).reshape(1, 16, 16) % 7 + jnp.zeros((4000, 1, 1), jnp.int32)
    corrupted, masked = jax.jit(Masking(7, schedule).corrupt)(keys_of(np.arange(4000)), ids)
    corrupted, masked = np.asarray(corrupted), np.asarray(masked)
    assert (corrupted[masked] == 7).all() and (corrupted == ids)[~masked].all()
    shares = masked.mean((1, 2))
    within = np.mean(shares * (1 - shares)) / 256                                 # of the binomial around its ratio
    np.testing.assert_allclose(shares.mean(), mean, atol=0.015)
    np.testing.assert_allclose(np.mean(shares**2) - within, moment, atol=0.015)
    together = np.mean(masked[:, 0, 0] & masked[:, 9, 5])
    np.testing.assert_allclose(together, moment, atol=0.03)


def test_masks_of_an_example_depend_on_its_index_alone(rng):
    masking, ids = Masking(9), jnp.asarray(rng.integers(0, 9, (5, 4, 4)))

    @jax.jit
    def run(rows):
        corrupted, masked = masking.corrupt(example_keys(jax.random.key(1), rows + 70), ids[rows])
        logits = jax.nn.one_hot(corrupted.reshape(-1, 16), 10)
        return masking.measure(logits, ids[rows], masked)["loss"], corrupted

    (whole, corrupted), (part, again) = run(np.arange(5)), run(np.array([3, 1]))
    corrupted = np.asarray(corrupted)
    np.testing.assert_array_equal(again, corrupted[[3, 1]])
    np.testing.assert_allclose(part, whole[np.array([3, 1])], rtol=1e-6)
    assert len({tuple(c.reshape(-1).tolist()) for c in (corrupted == 9)}) == 5


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("masked_only", [False, True])
def test_loss_is_torchs_cross_entropy(torch, rng, smoothing, masked_only):
    logits, ids = rng.normal(size=(3, 16, 12)).astype(np.float32) * 5, rng.integers(0, 11, (3, 4, 4))
    masked = rng.uniform(size=(3, 4, 4)) < 0.5
    values = Masking(11, label_smoothing=smoothing, masked_only=masked_only).measure(logits, ids, masked)
    rows = masked.reshape(3, 16) if masked_only else np.ones((3, 16), bool)
    for i in range(3):
        expected = torch.nn.functional.cross_entropy(
            torch.tensor(logits[i][rows[i]]), torch.tensor(ids[i].reshape(-1)[rows[i]]), label_smoothing=smoothing)
        np.testing.assert_allclose(values["loss"][i], expected.numpy(), rtol=1e-5)
        right = logits[i].argmax(-1) == ids[i].reshape(-1)
        np.testing.assert_allclose(values["accuracy_masked"][i], right[masked[i].reshape(-1)].mean(), rtol=1e-6)
        np.testing.assert_allclose(values["masked"][i], masked[i].mean(), rtol=1e-6)


def test_an_example_without_masks_counts_nothing(rng):
    ids = rng.integers(0, 11, (2, 16))
    values = Masking(11, masked_only=True).measure(rng.normal(size=(2, 16, 12)), ids, np.zeros((2, 16), bool))
    assert all(np.asarray(value).tolist() == [0, 0] for value in values.values())


TOKENS, CODES = 25, 13


def toy(rng, outputs):
    """A network whose logits depend on the step, on every token and on where it is: (ids, step) -> (B, N, outputs)."""
    table, places = (rng.normal(size=shape).astype(np.float32) for shape in
                     ((CODES + 1, outputs), (TOKENS, outputs)))

    def logits(ids, step):
        xp = jnp if isinstance(ids, jax.Array) else np
        seen = xp.asarray(table)[ids]
        whole = xp.roll(seen, 3, 1) - 1.5 * seen.mean(1, keepdims=True)
        return 2 * seen + xp.asarray(places) * (1 + 0.3 * step) + whole

    return logits


def transcribed(logits_of, to_draw, on_choice, settings, counts, batch):
    """Decoding of one example at a time and one token at a time, with noise from arrays."""
    result = []
    for b in range(batch):
        tokens, open_places = [CODES] * TOKENS, set(range(TOKENS))
        for i in range(settings.steps):
            logits = settings.inverse_temperature * np.asarray(logits_of(np.array([tokens]), i)[0], np.float64)
            left = (i + 1) / settings.steps if settings.schedule == "cosine" else i / (settings.steps - 1)
            found = {}
            for place in open_places:
                row = logits[place]
                token = int(np.argmax(row + to_draw[i, b, place]))
                log_p = row[token] - np.log(np.exp(row - row.max()).sum()) - row.max()
                found[place] = (log_p + settings.choice_temperature * (1 - left) * on_choice[i, b, place], token)
            best = sorted(found, key=lambda place, found=found: found[place], reverse=True)[:counts[i]]
            for place in best:
                tokens[place] = found[place][1]
            open_places -= set(best)
        assert not open_places
        result.append([min(token, CODES - 1) for token in tokens])
    return np.array(result)


@pytest.mark.parametrize("settings, counts, outputs", [
    (Decoding(6), [1, 3, 4, 5, 6, 6], CODES + 1),
    (Decoding(5, "linear", choice_temperature=0.0, inverse_temperature=0.4), [1, 2, 5, 8, 9], CODES + 1),  # 2 from 2.5
    (Decoding(6, "cosine", inverse_temperature=1.7), [1, 3, 4, 5, 6, 6], CODES),
])
def test_tokens_are_those_of_the_transcription(rng, settings, counts, outputs):
    to_draw = rng.gumbel(size=(settings.steps, 3, TOKENS, outputs)).astype(np.float32)
    on_choice = rng.gumbel(size=(settings.steps, 3, TOKENS)).astype(np.float32)
    noise = lambda i, shape: (jnp.asarray(to_draw)[i], jnp.asarray(on_choice)[i])
    network = toy(rng, outputs)
    counts_here = plan(settings, TOKENS).counts.tolist()
    ours = jax.jit(lambda: decode(network, noise, 3, TOKENS, CODES, settings))()
    assert ours.dtype == jnp.int32 and ours.shape == (3, TOKENS)
    np.testing.assert_array_equal(ours, transcribed(network, to_draw, on_choice, settings, counts_here, 3))
    assert counts_here == counts and len(np.unique(ours)) > 4


def test_a_mask_that_is_drawn_stays_and_ends_as_the_last_code():
    seen = []

    def network(ids, step):
        jax.debug.callback(lambda ids: seen.append(np.asarray(ids)), ids, ordered=True)
        likely = jnp.where(step == 0, CODES, 2)
        return 50.0 * jnp.broadcast_to(jax.nn.one_hot(likely, CODES + 1), (2, TOKENS, CODES + 1))

    settings = Decoding(2, "linear")
    found = np.asarray(jax.jit(lambda keys: decode(network, gumbel_noise(keys), 2, TOKENS, CODES, settings))(
        keys_of([0, 1])))
    assert plan(settings, TOKENS).counts.tolist() == [1, 24]
    assert (np.sort(found, 1)[:, -2:] == [2, CODES - 1]).all()                   # one drawn mask in each
    assert len(seen) == 2 and (seen[1] == CODES).all()                           # which the network sees as such


def test_tokens_are_drawn_from_the_softmax(rng):
    """One step fixes all tokens, so that their frequencies are the probabilities."""
    logits = rng.normal(size=CODES).astype(np.float32)
    settings = Decoding(1, guidance=0.0, inverse_temperature=2.0)
    network = lambda ids, step: jnp.broadcast_to(jnp.asarray(logits), (400, TOKENS, CODES))
    found = jax.jit(lambda keys: decode(network, gumbel_noise(keys), 400, TOKENS, CODES, settings))(
        keys_of(np.arange(400)))
    expected = np.exp(2 * logits) / np.exp(2 * logits).sum()
    np.testing.assert_allclose(np.bincount(np.asarray(found).reshape(-1), minlength=CODES) / 10_000, expected,
                               atol=0.015)


def test_every_noise_is_its_own_draw():
    """Of 50 x 30 x 4 numbers, none correlates with those of another step, and the two kinds not with each other."""
    noise = jax.jit(lambda step: gumbel_noise(keys_of(np.arange(50)))(step, (30, 4)))
    (sample, choice), (later, later_choice) = noise(0), noise(1)
    assert sample.shape == (50, 30, 4) and choice.shape == (50, 30)
    np.testing.assert_allclose(np.mean(sample), np.euler_gamma, atol=0.06)
    np.testing.assert_allclose(np.std(choice), np.pi / 6**0.5, rtol=0.08)
    for a, b in ((sample, later), (choice, later_choice), (sample[..., 0], choice)):
        assert abs(np.corrcoef(np.ravel(a), np.ravel(b))[0, 1]) < 0.1
    assert not np.isin(np.asarray(choice), np.asarray(sample)).any()


def test_tokens_of_an_example_depend_on_its_own_key_alone(rng):
    base = toy(rng, CODES + 1)
    network = lambda ids, labels: base(ids, 0) * (1 + 0.2 * labels[:, None, None])

    def run(numbers):
        return np.asarray(jax.jit(lambda keys, labels: generate(
            network, labels, 2, keys, TOKENS, CODES, Decoding(5)))(
                keys_of(numbers, 3), jnp.asarray(numbers) % 2))

    whole = run([0, 1, 2, 3, 4])
    np.testing.assert_array_equal(run([3, 1]), whole[[3, 1]])
    assert (whole[0] != whole[2]).mean() > 0.2                                   # the same label, other noise


def test_guidance_grows_linearly_and_without_it_nothing_is_doubled(rng):
    sizes = []

    def network(ids, labels):
        sizes.append(len(ids))
        return jnp.asarray(ids, jnp.float32)[..., None] + 10.0 * labels[:, None, None] ** jnp.arange(3)

    ids, labels = jnp.asarray(rng.integers(0, CODES, (2, TOKENS))), jnp.array([1, 3])
    guided = guided_logits(network, labels, 5, Decoding(8, guidance=3.0))
    cond, uncond = network(ids, labels), network(ids, jnp.array([5, 5]))
    for step, w in ((0, 0.0), (1, 3 / 7), (7, 3.0)):
        np.testing.assert_allclose(guided(ids, jnp.array(step)), (1 + w) * cond - w * uncond, rtol=1e-5)
    assert sizes == [2, 2, 4, 4, 4]
    plain = guided_logits(network, labels, None, Decoding(8, guidance=0.0))
    np.testing.assert_array_equal(plain(ids, 3), cond)
    assert sizes[-1] == 2


@pytest.mark.parametrize("make, message", [
    (lambda: Masking(0), "codes is 0"), (lambda: Masking(schedule="root"), "schedule is 'root'.*arccos"),
    (lambda: Masking(label_smoothing=1.0), "label_smoothing is 1.0"),
    (lambda: Decoding(0), "steps is 0"), (lambda: Decoding(8.0), "steps is 8.0"), (lambda: Decoding(True), "steps"),
    (lambda: Decoding(schedule="log"), "schedule is 'log'.*cosine"),
    (lambda: Decoding(guidance=-1.0), "guidance is -1"),
    (lambda: Decoding(guidance=float("nan")), "guidance is nan"),
    (lambda: Decoding(choice_temperature=-0.1), "choice_temperature"),
    (lambda: Decoding(inverse_temperature=0.0), "inverse_temperature is 0.0"),
    (lambda: Decoding(1), "guidance grows from 0"),
    (lambda: plan(Decoding(26, "cosine"), 25), "steps is 26"), (lambda: plan(Decoding(26), 25), "steps is 26"),
    (lambda: guided_logits(None, None, None, Decoding()), "guidance is 3.0, but this network"),
    (lambda: decode(lambda ids, i: jnp.zeros((2, 25, 9)), gumbel_noise(keys_of([0, 1])), 2, 25, 13, Decoding()),
     r"logits \(2, 25, 9\) for 2 images of 25 tokens and 13 codes"),
])
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
