"""What the published files of DINOv2 hold, under both families' names, with random numbers; NumPy alone."""

import json
import re

import numpy as np
import safetensors.numpy


def random_tensors(rng, depth=2, width=128, registers=0, grid=37, swiglu=False):
    """Meta's names -> float32 arrays, nothing at 0 or 1: kernels that keep the size of what they multiply."""
    hidden = ((8 * width // 3) + 7) // 8 * 8 if swiglu else 4 * width
    tensors = {}

    def dense(name, out, *inputs):
        tensors[f"{name}.weight"] = rng.normal(0, np.prod(inputs) ** -0.5, (out, *inputs))
        tensors[f"{name}.bias"] = rng.normal(0, 0.3, out)

    def norm(name):
        tensors[f"{name}.weight"] = rng.uniform(0.5, 1.5, width)
        tensors[f"{name}.bias"] = rng.normal(0, 0.3, width)

    tokens = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + grid**2, width), "mask_token": (1, width)}
    tokens |= {"register_tokens": (1, registers, width)} if registers else {}
    tensors |= {name: rng.normal(0, 1, shape) for name, shape in tokens.items()}
    dense("patch_embed.proj", width, 3, 14, 14)
    for i in range(depth):
        norm(f"blocks.{i}.norm1")
        dense(f"blocks.{i}.attn.qkv", 3 * width, width)
        dense(f"blocks.{i}.attn.proj", width, width)
        norm(f"blocks.{i}.norm2")
        dense(f"blocks.{i}.mlp.{'w12' if swiglu else 'fc1'}", (1 + swiglu) * hidden, width)
        dense(f"blocks.{i}.mlp.{'w3' if swiglu else 'fc2'}", width, hidden)
        tensors |= {f"blocks.{i}.ls{j}.gamma": rng.normal(0, 1, width) for j in (1, 2)}
    norm("norm")
    return {name: value.astype(np.float32) for name, value in tensors.items()}


RENAMED = (
    (r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1"), (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"), (r"^norm\.", "layernorm."),
    (r"^blocks\.", "encoder.layer."), (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.ls(\d)\.gamma$", r".layer_scale\1.lambda1"), (r"\.mlp\.w12\.", ".mlp.weights_in."),
    (r"\.mlp\.w3\.", ".mlp.weights_out."),
)


def to_hugging_face(tensors):
    """The same tensors as files on the Hugging Face Hub have them: queries, keys and values apart."""
    renamed = {}
    for name, value in tensors.items():
        for pattern, target in RENAMED:
            name = re.sub(pattern, target, name)
        if ".attn.qkv." in name:
            parts = zip(("query", "key", "value"), np.split(value, 3), strict=True)
            renamed |= {name.replace("attn.qkv", f"attention.attention.{part}"): third for part, third in parts}
        else:
            renamed[name] = value
    return {name: np.ascontiguousarray(value) for name, value in renamed.items()}


def config_of(tensors):
    """The config.json of a folder, as plain values."""
    width, registers = tensors["cls_token"].shape[-1], tensors.get("register_tokens", np.zeros((1, 0))).shape[1]
    config = {
        "model_type": "dinov2_with_registers" if registers else "dinov2", "hidden_size": width,
        "num_attention_heads": width // 64, "mlp_ratio": 4, "patch_size": 14, "layer_norm_eps": 1e-6,
        "num_hidden_layers": sum(name.endswith("ls1.gamma") for name in tensors), "hidden_act": "gelu",
        "qkv_bias": True, "image_size": 14 * round((tensors["pos_embed"].shape[1] - 1) ** 0.5),
        "use_swiglu_ffn": "blocks.0.mlp.w12.weight" in tensors,
    }
    return config | ({"num_register_tokens": registers} if registers else {})


def write_folder(folder, tensors):
    """A folder for transformers' from_pretrained."""
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file(to_hugging_face(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config_of(tensors)))
    return folder
