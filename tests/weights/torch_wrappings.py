"""The forms in which one state dict of an autoencoder comes in other people's files."""

import argparse
import collections


class ModelCheckpoint:
    """Stands for Lightning's classes: instances and the class itself are in checkpoints, and no reader has them."""

    def __init__(self):
        self.best_k_models = {"a.ckpt": 1.0}


def lightning(torch, state):
    """What Lightning 1.4 saves: callbacks are keyed by their classes, settings are objects."""
    adam = {"state": {0: {"step": 3, "exp_avg": torch.randn(2, 2), "exp_avg_sq": torch.rand(2, 2)}},
            "param_groups": [{"lr": 4.5e-6, "betas": (0.5, 0.9), "params": [0]}]}
    return {
        "epoch": 3, "global_step": 7, "pytorch-lightning_version": "1.4.2",
        "state_dict": collections.OrderedDict(state),
        "callbacks": {ModelCheckpoint: {"best_model_score": torch.tensor(0.3), "monitor": ModelCheckpoint()}},
        "optimizer_states": [adam, adam], "lr_schedulers": [],
        "hyper_parameters": argparse.Namespace(base_learning_rate=4.5e-6, ddconfig={"z_channels": 4}),
    }


def save(torch, value, path, **options):
    torch.save(value, path, **options)
    return path


def safetensors(torch, state, directory):
    from safetensors.torch import save_file

    save_file({f"vae.{name}": value.contiguous() for name, value in state.items()}, directory / "vae.safetensors")
    return directory / "vae.safetensors"


# name -> function of (torch, state dict, directory) that writes a file and returns its path
WRAPPINGS = {
    "bare": lambda torch, state, where: save(torch, state, where / "x.pth"),
    "lightning": lambda torch, state, where: save(torch, lightning(torch, state), where / "x.ckpt"),
    "legacy": lambda torch, state, where: save(
        torch, lightning(torch, state), where / "x.ckpt", _use_new_zipfile_serialization=False),
    "protocol 4": lambda torch, state, where: save(torch, lightning(torch, state), where / "x.ckpt", pickle_protocol=4),
    "whole Stable Diffusion": lambda torch, state, where: save(torch, {"state_dict": {
        "model.diffusion_model.x": torch.randn(2), "cond_stage_model.decoder.x": torch.randn(2),
        **{f"first_stage_model.{name}": value for name, value in state.items()}}}, where / "x.ckpt"),
    "safetensors under vae.": safetensors,
}
