#!/usr/bin/env bash
# What EQ does for a generator, small: two autoencoders of Fashion-MNIST, one fine-tuned plainly and one with EQ; their
# latents; a SiT on each; samples, and their Fréchet distances. Every step goes on where it was stopped.
#
#   launch/generators.sh DIR     with the four files of Fashion-MNIST, train-images-idx3-ubyte.gz and so on
#
# VENV and RUNS name other directories than .venv and runs; PYTHON another interpreter than python3.
set -euo pipefail
if [ $# -ne 1 ]; then
  sed -n 2,7p "$0" >&2
  exit 2
fi
images="idx:$(realpath "$1")"
cd "$(dirname "$0")/.."
source launch/environment.sh ""
runs="${RUNS:-runs}/fashion"
data=(--config.data.train="$images:train" --config.data.evaluation="$images:test")

python -m eqvae_jax.main --config=configs/fashion_classifier.py --workdir="$runs/cnn" "${data[@]}"
python -m eqvae_jax.main --config=configs/eq_sdvae.py:fashion --workdir="$runs/autoencoders" "${data[@]}"
generated=()
for arm in control eq; do
  python -m eqvae_jax.encode --autoencoder="workdir:$runs/autoencoders/$arm" --images="$images:train" --limit=20000 \
    --image_size=28 --batch_size=200 --output="$runs/latents-$arm"
  python -m eqvae_jax.main --config=configs/sit.py:quickstart --workdir="$runs/sit-$arm" \
    --config.data.latents="$runs/latents-$arm" --config.evaluation.features="workdir:$runs/cnn" \
    --config.evaluation.reference="$images:test"
  if [ ! -e "$runs/samples-$arm.npz" ]; then
    python -m eqvae_jax.sample --generator="workdir:$runs/sit-$arm" --count=2000 --batch_size=100 \
      --output="$runs/samples-$arm.npz"
  fi
  generated+=(--generated "$arm=$runs/samples-$arm.npz")
done
python -m eqvae_jax.evaluate generation --reference="$images:test" "${generated[@]}" \
  --features="workdir:$runs/cnn" --output="$runs/evaluation"
