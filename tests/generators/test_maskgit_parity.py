"""Forward passes beside transcriptions of both MaskGITs in torch, with random weights in every layer, from files."""

import jax
import numpy as np
import pytest
from flax import serialization

from eqvae_jax.weights.generators import load_generator

# Odd sizes on purpose: tokens are not codes, heads not features of a head. loud: the size of what the first layer norms
# see; at 0.001 their epsilons show.
FORMS = {
    "deep": dict(loud=1.0, input_size=6, codes=23, classes=7, width=96, depth=3, heads=2, mlp_size=160),
    "heads of 48": dict(loud=1.0, input_size=5, codes=19, classes=9, width=768, depth=1, heads=16, mlp_size=112),
    "quiet": dict(loud=0.001, input_size=4, codes=23, classes=7, width=96, depth=1, heads=2, mlp_size=160),
}


def compare(ours, theirs, hidden, fields):
    assert ours.prediction.shape == theirs.shape and len(ours.hidden) == fields["depth"]
    for a, b in [(ours.prediction, theirs), *zip(ours.hidden, hidden, strict=True)]:
        b = b.numpy()
        assert np.abs(a - b).max() < 1e-5 * np.abs(b).max()
    assert len({tuple(np.round(y.reshape(-1)[:3].numpy(), 3)) for y in theirs}) == len(theirs)  # nothing is constant


@pytest.mark.parametrize("form", FORMS)
def test_the_reproduction_matches_torch(torch, torch_maskgit, rng, tmp_path, form):
    fields = dict(FORMS[form])
    loud = fields.pop("loud")
    reference = torch_maskgit.randomise(torch_maskgit.MaskGIT(**fields))
    with torch.no_grad():
        for parameter in (reference.tok_emb.weight, reference.pos_emb, *reference.first_layer[6].parameters()):
            parameter.mul_(loud)
    torch.save({"iter": 9, "global_epoch": 1, "model_state_dict": reference.state_dict()}, tmp_path / "model.pth")
    model, params, _ = load_generator(f"maskgit:{tmp_path / 'model.pth'}", heads=fields["heads"], codes=fields["codes"])
    assert {name: getattr(model, name) for name in fields} == fields

    side, codes, null = fields["input_size"], fields["codes"], fields["classes"]
    ids, labels = rng.integers(0, codes + 1, (4, side, side)), np.array([0, 3, null - 1, null])
    ids[0, 0, :2] = codes, codes - 1                                                   # a mask, and the last code
    with torch.no_grad():
        theirs, hidden = reference(torch.tensor(ids), torch.tensor(labels))
    with jax.default_matmul_precision("highest"):
        ours = jax.jit(model.apply)({"params": params}, ids, labels)
    compare(ours, theirs, hidden, fields)


@pytest.mark.parametrize("form", FORMS)
def test_the_original_matches_torch(torch, torch_maskgit, rng, tmp_path, form):
    fields = dict(FORMS[form])
    loud = np.float32(fields.pop("loud"))
    tree = torch_maskgit.original_tree(rng, **fields)
    for table in (tree["Embed_0"]["word_embeddings"], tree["Embed_0"]["position_embeddings"]):
        table["embedding"] *= loud
    (tmp_path / "checkpoint").write_bytes(serialization.msgpack_serialize({"params": tree}))
    model, params, _ = load_generator(f"maskgit:{tmp_path / 'checkpoint'}", codes=fields["codes"])
    assert {name: getattr(model, name) for name in fields} == fields

    side, codes = fields["input_size"], fields["codes"]
    ids, labels = rng.integers(0, codes + 1, (3, side**2)), np.array([0, 3, fields["classes"] - 1])
    ids[0, :2] = codes, codes - 1
    with torch.no_grad():
        theirs, hidden = torch_maskgit.original(tree, torch.tensor(np.where(ids == codes, -1, ids)),
                                                torch.tensor(labels), codes)
    with jax.default_matmul_precision("highest"):
        ours = jax.jit(model.apply)({"params": params}, ids, labels)
    compare(ours, theirs, hidden, fields)
