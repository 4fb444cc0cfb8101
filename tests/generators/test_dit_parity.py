"""The forward pass beside a transcription of DiT in torch, with random weights in every layer, read from its file."""

import jax
import numpy as np
import pytest

from eqvae_jax.weights.generators import load_generator

# Odd sizes on purpose: rows are not columns, patches not channels, heads not features of a head.
FORMS = {
    "DiT with variance": dict(kind="dit", patch_size=2, in_channels=4, out_channels=8, width=128, depth=3, heads=2),
    "large patches": dict(kind="dit", patch_size=4, in_channels=3, out_channels=3, width=192, depth=2, heads=3),
    "XL's head of 72": dict(kind="dit", patch_size=4, in_channels=4, out_channels=8, width=1152, depth=1, heads=16),
    "SiT, 8 channels": dict(kind="sit", patch_size=2, in_channels=4, out_channels=8, width=128, depth=2, heads=2),
    "SiT, 4 channels": dict(kind="sit", patch_size=2, in_channels=4, out_channels=4, width=128, depth=2, heads=2),
    "norms of queries and keys": dict(kind="dit", patch_size=2, in_channels=5, out_channels=5, width=128, depth=2,
                                      heads=2, qk_norm=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_forward_matches_torch(torch, torch_dit, rng, tmp_path, form):
    fields = dict(FORMS[form])
    kind = fields.pop("kind")
    wide = kind == "sit" and fields["out_channels"] == 2 * fields["in_channels"]
    reference = (torch_dit.SiT if wide else torch_dit.DiT)(input_size=16, classes=9, **fields)
    torch_dit.randomise(reference)
    torch.save(reference.state_dict(), tmp_path / "model.pt")
    model, params, _ = load_generator(f"{kind}:{tmp_path / 'model.pt'}")

    size = 5
    x = rng.normal(size=(size, 16, 16, fields["in_channels"])).astype(np.float32)
    labels = np.array([0, 3, 8, 9, 9])                                                 # 9: no label
    t = np.array([0, 3, 500, 998, 999] if kind == "dit" else [0, 0.001, 0.37, 0.9, 1], np.float32)
    with torch.no_grad():
        theirs, hidden = reference(torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(t if kind == "dit" else 1 - t),
                                   torch.tensor(labels))
    theirs = theirs.permute(0, 2, 3, 1).numpy()
    theirs = theirs if kind == "dit" else -theirs                                     # velocity towards noise
    with jax.default_matmul_precision("highest"):
        ours = jax.jit(model.apply)({"params": params}, x, t, labels)
    assert ours.prediction.shape == theirs.shape and len(ours.hidden) == fields["depth"]
    for a, b in [(ours.prediction, theirs), *zip(ours.hidden, [h.numpy() for h in hidden], strict=True)]:
        assert np.abs(a - b).max() < 1e-5 * np.abs(b).max()
    assert len({tuple(np.round(y.reshape(-1)[:3], 3)) for y in theirs}) == size       # nothing is constant


def test_forward_matches_diffusers_where_the_two_agree(torch, torch_dit, diffusers, rng, tmp_path):
    """At t = 0, with the norms' epsilon of DiT: elsewhere diffusers' frequencies of time are others (127, not 128)."""
    reference = torch_dit.randomise(torch_dit.DiT(input_size=8, classes=9, width=128, depth=2, heads=2))
    torch.save(reference.state_dict(), tmp_path / "model.pt")
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=9, norm_eps=1e-6).eval()
    state, names = {}, {
        "norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0", "norm1.emb.class_embedder.embedding_table":
        "y_embedder.embedding_table", "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "norm1.linear": "adaLN_modulation.1", "attn1.to_out.0": "attn.proj", "ff.net.0.proj": "mlp.fc1",
        "ff.net.2": "mlp.fc2", "pos_embed.proj": "x_embedder.proj", "proj_out_1": "final_layer.adaLN_modulation.1",
        "proj_out_2": "final_layer.linear"}
    public = reference.state_dict()
    for key in theirs.state_dict():
        layer, leaf = key.rsplit(".", 1)
        block = layer.split(".")[1] if layer.startswith("transformer_blocks") else None
        layer = layer.split(".", 2)[2] if block else layer
        if layer.startswith("attn1.to_") and layer != "attn1.to_out.0":
            state[key] = public[f"blocks.{block}.attn.qkv.{leaf}"].chunk(3)["qkv".index(layer[-1])]
        else:  # each block has its own copy of the embeddings
            prefix = f"blocks.{block}." if block and "emb." not in layer else ""
            state[key] = public[f"{prefix}{names[layer]}.{leaf}"]
    theirs.load_state_dict(state, strict=True)
    x, labels = rng.normal(size=(3, 8, 8, 4)).astype(np.float32), np.array([0, 8, 9])
    with torch.no_grad():
        expected = theirs(torch.tensor(x).permute(0, 3, 1, 2), torch.zeros(3, dtype=torch.long),
                          class_labels=torch.tensor(labels)).sample.permute(0, 2, 3, 1).numpy()
    model, params, _ = load_generator(f"dit:{tmp_path / 'model.pt'}")
    with jax.default_matmul_precision("highest"):
        ours = jax.jit(model.apply)({"params": params}, x, np.zeros(3, np.float32), labels).prediction
    assert np.abs(ours - expected).max() < 1e-5 * np.abs(expected).max()
