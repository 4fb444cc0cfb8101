"""The stages that all experiments are made of, at one scale, for one seed.

An arm is what is done to an autoencoder after its start: `before` nothing, `control` plain training for as long as the
others. All arms of a seed go on from one start.
"""

from typing import NamedTuple

from eqvae_jax.reproduction.scales import Scale
from eqvae_jax.reproduction.stages import Output, Stage, leaves_of

PLAIN = ("--config.equivariance.p_equivariance=0.0", "--config.equivariance.p_low_resolution=0.0")
# Arm -> flags; {side} is the full side of the latents, {shift} and {noise} are the scale's.
ARMS = {
    "control": PLAIN,
    "eq": (),
    "rotation": ("--config.equivariance.sizes=({side},)",),
    "scaling": ("--config.equivariance.turns=(0,)",),
    "anisotropic": ("--config.equivariance.anisotropic=True",),
    "p_alpha 0.3": ("--config.equivariance.p_equivariance=0.7",),
    "p_alpha 0.7": ("--config.equivariance.p_equivariance=0.3",),
    # The paper adds its explicit term to the loss of every step.
    "explicit": ("--config.equivariance.objective=explicit", "--config.equivariance.p_equivariance=1.0"),
    "explicit stop-gradient": (
        "--config.equivariance.objective=explicit_stop_gradient",
        "--config.equivariance.p_equivariance=1.0",
    ),
    # docs/beyond.md
    "scale equivariance": (*PLAIN, "--config.loss.scale_equivariance_weight=0.25"),
    "eq and scale equivariance": ("--config.loss.scale_equivariance_weight=0.25",),
    "eq and reflect padding": ("--config.model.padding=reflect",),
    "eq and shifts": ("--config.equivariance.max_shift={shift}",),
    "eq and latent noise": ("--config.loss.latent_noise={noise}",),
}
UNSCALED = ("sdvae16",)  # no scale of its latents was published: their measured spread takes its place
FASHION_SET = 60_000  # images in its training set; only estimates of time and disk use it


class Measure(NamedTuple):
    """A number that a stage of evaluation finds: its key in metrics.json, without the network in brackets."""

    stage: Stage
    key: str


class Bench(NamedTuple):
    """Makes stages; each method returns one, and the stages before it are its inputs."""

    scale: Scale
    seed: int = 0

    def classifier(self, seed=0):
        """The network of Fréchet distances, one for all seeds, or the yardstick would change with what is measured; of
        another seed, the network that REPA is aligned with: not the one that judges it.
        """
        return Stage(
            "aligner" if seed else "classifier",
            "main",
            (f"--config={self.scale.classifier}", *self._data("train"), f"--config.seed={seed}"),
            ("classifier", 1),
            2e6,
        )

    def base(self, kind):
        """An autoencoder of a kind, such as "sdvae" or "vqgan", trained plainly from random weights."""
        steps = self.scale.base
        arguments = (*self._autoencoder(kind), *PLAIN, *self._length(steps))
        return Stage(f"{kind} base seed {self.seed}", "main", arguments, (f"{kind} step", steps), 10e6)

    def autoencoder(self, kind, arm):
        """The start, trained on as the arm says."""
        steps = self.scale.tune or leaves_of(self._config(kind))["training"]["steps"]
        lpips = ("--config.loss.lpips_weights=download",) if self.scale.start else ()
        scale = self.scale
        flags = [flag.format(side=scale.sides[kind], shift=scale.shift, noise=scale.noise) for flag in ARMS[arm]]
        start = self._start(kind, "--config.init={}")
        arguments = (*self._autoencoder(kind), *flags, start, *lpips, *self._length(steps))
        work = f"{kind} {'step' if arm == 'control' else 'EQ step'}"
        return Stage(f"{kind} {arm} seed {self.seed}", "main", arguments, (work, steps), 10e6)

    def latents(self, kind, arm, keep_images=False):
        """A cache of posteriors or codes, with the images beside them for REPA."""
        count = self.scale.latents or FASHION_SET
        arguments = [
            self._reference(kind, arm, "--autoencoder={}"),
            f"--images={self.scale.images['train']}",
            f"--image_size={self.scale.image_size}",
            f"--batch_size={self.scale.batch}",
        ]
        arguments += [f"--limit={self.scale.latents}"] if self.scale.latents else []
        arguments += ["--keep_images"] if keep_images else []
        name = f"{kind} {arm} latents{' and images' if keep_images else ''}{self._seeded(arm)}"
        disk = (9e3 if keep_images else 5e3) * count
        return Stage(name, "encode", tuple(arguments), ("encoded image", count), disk)

    def generator(self, name, arm, kind, share=1.0, watched=False):
        """A generator on an arm's latents, trained for a share of its steps, with a schedule of that length.

        name: dit, sit, repa or maskgit, or a variant of one such as "dit long", which is the plain one where the scale
        has no such variant. watched: every eighth of its steps it draws a few samples of always the same noise, and
        measures some more.
        """
        name = self._known(name)
        config = self.scale.generators.get(f"{name} on {kind}", self.scale.generators[name])
        leaves = leaves_of(config)
        steps = max(1, round(share * (self.scale.steps.get(name) or leaves["training"]["steps"])))
        warm_up = leaves["optimizer"]["warmup_steps"]
        shorter = (f"--config.optimizer.warmup_steps={round(share * warm_up)}",) if share < 1 and warm_up else ()
        measured = ("--config.data.scale=measured",) if kind in UNSCALED and self.scale.start else ()
        label = f"{name} on {kind} {arm}{f' for {share:.0%} of the steps' if share < 1 else ''}"
        repa, watch = name.startswith("repa"), ()
        if watched:
            every, label = max(1, steps // 8), f"{label}, watched,"
            watch = (
                f"--config.training.eval_every={every}",
                f"--config.training.preview_every={every}",
                *self._features("--config.evaluation."),
                f"--config.evaluation.reference={self._real()}",
            )
        latents = Output(self.latents(kind, arm, keep_images=repa), "--config.data.latents={}")
        align = (self._aligned(),) if repa else ()
        arguments = (f"--config={config}", latents, *align, *watch, *shorter, *measured, *self._length(steps))
        return Stage(f"{label} seed {self.seed}", "main", arguments, (f"{name.split()[0]} step", steps), 25e6)

    def samples(self, name, arm, kind, share=1.0, guided=False):
        generator = self.generator(name, arm, kind, share)
        plain = name.split()[0]
        arguments = (
            Output(generator, "--generator=workdir:{}"),
            self._reference(kind, arm, "--autoencoder={}"),
            f"--count={self.scale.samples}",
            f"--batch_size={self.scale.sample_batch}",
            f"--seed={self.seed}",
            *(self.scale.guidance[plain] if guided else ()),
        )
        label = generator.name.removesuffix(f" seed {self.seed}") + (", guided," if guided else "")
        work = (f"{plain} sample", self.scale.samples * (2 if guided else 1))
        disk = 3.0 * self.scale.image_size**2 * self.scale.samples
        return Stage(f"samples of {label} seed {self.seed}", "sample", arguments, work, disk)

    def generation(self, name, arm, kind="sdvae", share=1.0, guided=False):
        """FID and more of a generator's samples against real images."""
        samples = self.samples(name, arm, kind, share, guided)
        metrics = ("fid", "inception_score", "precision_recall", *(() if self.scale.classifier else ("sfid",)))
        return Stage(
            f"evaluation of {samples.name}",
            "evaluate",
            (
                "generation",
                f"--reference={self._real()}",
                Output(samples, "--generated=model={}"),
                f"--image_size={self.scale.image_size}",
                *self._features("--"),
                f"--batch_size={self.scale.batch}",
                "--metrics",
                *metrics,
            ),
            ("classified image", 3 * self.scale.samples),
            1e4,
        )

    def reconstruction(self, kind, arm):
        """rFID, PSNR, SSIM, and LPIPS where its weights can be had."""
        more = ("--lpips=download",) if self.scale.start else ()
        return self._evaluate(
            "reconstruction",
            kind,
            arm,
            self.scale.reconstructed,
            *(self._features("--") if self.scale.distances else ()),
            *more,
            work=("decoded image", 1.3),
        )

    def equivariance(self, kind, arm, features=False):
        """R and S, of latents and of decoded pixels; with features also rFID under each transform."""
        more = self._features("--") if features else ()
        limit = self.scale.reconstructed if features else self.scale.moved
        label = "equivariance and rFID" if features else "equivariance"
        return self._evaluate("equivariance", kind, arm, limit, *more, work=("decoded image", 10), label=label)

    def dimension(self, kind, arm):
        """The latents' intrinsic dimension and spectrum."""
        return self._evaluate("latents", kind, arm, self.scale.encoded, work=("encoded image", 0.5))

    def autoencoders_report(self, kind, arms):
        """Pictures of autoencoders side by side: their latents, their decodes of moved latents, their errors."""
        columns = [Output(self.autoencoder(kind, arm), f"{arm}={{}}") for arm in arms]
        return Stage(
            f"report of {kind} {' and '.join(arms)} seed {self.seed}",
            "report",
            (
                "--runs",
                *columns,
                f"--images={self.scale.images['test']}",
                f"--image_size={self.scale.image_size}",
                f"--batch_size={self.scale.batch}",
                f"--limit={self.scale.moved or 1000}",
                *self._crops(),
            ),
            ("decoded image", 12 * len(arms) * self._count(self.scale.moved or 1000)),
            3e6,
        )

    def generators_report(self, name, arms, kind="sdvae"):
        """Pictures of generators side by side: how fast they learn."""
        columns = [Output(self.generator(name, arm, kind, watched=True), f"{arm}={{}}") for arm in arms]
        return Stage(
            f"report of {name} on {' and '.join(arms)} seed {self.seed}",
            "report",
            ("--runs", *columns),
            ("report", 1),
            3e6,
        )

    def _config(self, kind):
        return f"configs/eq_{kind}.py{f':{self.scale.variant}' if self.scale.variant else ''}"

    def _autoencoder(self, kind):
        """Flags of all trainings of a kind. The batch is one of them, or it would depend on the devices."""
        leaves = leaves_of(self._config(kind))
        batch = leaves["data"]["batch_per_device"] * leaves["training"]["accumulate"] * self.scale.devices
        return (f"--config={self._config(kind)}", *self._data("tuning"), f"--config.data.batch_size={batch}")

    def _length(self, steps):
        return (f"--config.training.steps={steps}", f"--config.seed={self.seed}")

    def _seeded(self, arm):
        """What a stage's name says of the seed: nothing where published weights are all that it depends on."""
        return "" if arm == "before" and self.scale.start else f" seed {self.seed}"

    def _known(self, name):
        if not self.scale.generators:
            raise ValueError("this scale has autoencoders only, and no generators.")
        return name if name in self.scale.generators else name.split()[0]

    def _data(self, split):
        return (
            f"--config.data.train={self.scale.images[split]}",
            f"--config.data.evaluation={self.scale.images['test']}",
        )

    def _start(self, kind, form):
        """Where all arms begin, in a flag: published weights, or the base."""
        if self.scale.start:
            return form.format(self.scale.start[kind])
        return Output(self.base(kind), form.format("workdir:{}"))

    def _reference(self, kind, arm, form):
        if arm == "before":
            return self._start(kind, form)
        return Output(self.autoencoder(kind, arm), form.format("workdir:{}"))

    def _real(self):
        return self.scale.reference or self.scale.images["test"]

    def _count(self, limit):
        """Images of an evaluation, for estimates."""
        return min(limit or self.scale.tested, self.scale.tested) * self.scale.crops

    def _crops(self):
        return () if self.scale.crops == 1 else (f"--crops={self.scale.crops}", f"--min_crop={self.scale.min_crop}")

    def _features(self, prefix):
        if not self.scale.distances:
            raise ValueError("this scale has too few images for Fréchet distances.")
        if self.scale.classifier:
            return (Output(self.classifier(), f"{prefix}features=workdir:{{}}"),)
        return (f"{prefix}features=inception", f"{prefix}inception=download")

    def _aligned(self):
        """The encoder that REPA aligns with."""
        if self.scale.classifier:
            return Output(self.classifier(seed=1), "--config.alignment.encoder=workdir:{}")
        return "--config.alignment.encoder=dinov2:dinov2_vitb14_pretrain.pth"

    def _evaluate(self, measure, kind, arm, limit, *more, work, label=""):
        limits = (f"--limit={limit}",) if limit else ()
        return Stage(
            f"{label or measure} of {kind} {arm}{self._seeded(arm)}",
            "evaluate",
            (
                measure,
                self._reference(kind, arm, "--autoencoder=model={}"),
                f"--images={self.scale.images['test']}",
                f"--image_size={self.scale.image_size}",
                f"--batch_size={self.scale.batch}",
                *limits,
                *self._crops(),
                *more,
            ),
            (work[0], work[1] * self._count(limit)),
            5e5,
        )
