#!/usr/bin/env bash
# What EQ does for generators, small: autoencoders of Fashion-MNIST, one fine-tuned plainly and one with EQ, of either
# kind; their latents; SiT and REPA on those of the KL autoencoder, MaskGIT on the codes of the VQ one; samples, and their
# Fréchet distances. Every step goes on where it was stopped. Hours on two CPU cores.
#
#   launch/generators.sh DIR [sit] [repa] [maskgit]     with the four files of Fashion-MNIST, train-images-idx3-ubyte.gz
#                                                       and so on; without a name it is sit
#
# VENV and RUNS name other directories than .venv and runs; PYTHON another interpreter than python3.
set -euo pipefail
if [ $# -lt 1 ]; then
  sed -n 2,9p "$0" >&2
  exit 2
fi
images="idx:$(realpath "$1")"
shift
for generator in "$@"; do
  case "$generator" in sit | repa | maskgit) ;; *) echo "there is no generator $generator: sit, repa, maskgit" >&2; exit 2 ;; esac
done
cd "$(dirname "$0")/.."
source launch/environment.sh ""
runs="${RUNS:-runs}/fashion"
data=(--config.data.train="$images:train" --config.data.evaluation="$images:test")

python -m eqvae_jax.main --config=configs/fashion_classifier.py --workdir="$runs/cnn" "${data[@]}"
for generator in "${@:-sit}"; do
  config="configs/$generator.py:quickstart" more=()
  case "$generator" in
    sit) kind=sdvae ;;
    repa) kind=sdvae more=(--config.alignment.encoder="workdir:$runs/cnn") ;;
    maskgit) kind=vqgan ;;
  esac
  python -m eqvae_jax.main --config="configs/eq_$kind.py:fashion" --workdir="$runs/$kind" "${data[@]}"
  generated=()
  for arm in control eq; do
    python -m eqvae_jax.encode --autoencoder="workdir:$runs/$kind/$arm" --images="$images:train" --limit=20000 \
      --image_size=28 --batch_size=200 --keep_images --output="$runs/latents-$kind-$arm"
    python -m eqvae_jax.main --config="$config" --workdir="$runs/$generator-$arm" "${more[@]}" \
      --config.data.latents="$runs/latents-$kind-$arm" --config.evaluation.features="workdir:$runs/cnn" \
      --config.evaluation.reference="$images:test"
    if [ ! -e "$runs/$generator-$arm.npz" ]; then
      python -m eqvae_jax.sample --generator="workdir:$runs/$generator-$arm" --count=2000 --batch_size=100 \
        --output="$runs/$generator-$arm.npz"
    fi
    generated+=(--generated "$arm=$runs/$generator-$arm.npz")
  done
  python -m eqvae_jax.evaluate generation --reference="$images:test" "${generated[@]}" \
    --features="workdir:$runs/cnn" --output="$runs/evaluation-$generator"
  python -m eqvae_jax.report --runs control="$runs/$generator-control" eq="$runs/$generator-eq" \
    --output="$runs/report-$generator"
done
