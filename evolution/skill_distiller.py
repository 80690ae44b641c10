"""One gap becomes one expert, or the reason why not: teach → train → examine → publish.

Every stage leaves its result as a file in the job's directory before the journal says that the next one begins, and a
stage that finds its result there takes it. So a job that was killed goes on where it stood, and the card that an exam
has passed is published once, however often publishing is tried: its bytes are on disk before the registry sees them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from evolution.anchors import general_texts, replay
from evolution.combiner import refit
from evolution.errors import JobError
from evolution.evaluation import Examiner
from evolution.examples import normalised, read_examples, sieved, split, write_examples
from evolution.executors import Cancelled, Executor
from evolution.gate import AlphaSpending, judge
from evolution.journal import GapRecord, Job, Journal
from evolution.protocols import Example, Routes, Students, Teacher, Theme
from evolution.recipe import Recipe
from evolution.repair import repaired
from evolution.signals import SignalStore
from evolution.survey import GROWING, PUBLISHED, REJECTED, theme_of
from evolution.target_plan import Plan, read_plan
from evolution.training_job import (
    ModelSpec,
    Probe,
    Replay,
    Step,
    Trained,
    TrainingJob,
    Validation,
    read_trained,
)
from evolution.workspace import Workspace, exam_of
from registry.card import LoRACard
from registry.errors import LabelTakenError
from registry.files import written_whole
from registry.format import LoRAFormat
from registry.logs import get_logger
from registry.store import Registry

STAGES: Final = ("teach", "train", "examine", "publish")
ASKED_AT_ONCE: Final = 64

log = get_logger(__name__)


class RejectedError(JobError):
    """A gap gets no expert tonight, for a reason that trying again does not change."""


class SkillDistiller:
    """Grows experts. What it needs of the node is handed in; `models` says how a base is loaded by another process."""

    def __init__(
        self,
        registry: Registry,
        journal: Journal,
        signals: SignalStore,
        *,
        teacher: Teacher,
        students: Students,
        routes: Routes,
        executor: Executor,
        models: Callable[[str], ModelSpec],
        recipe: Recipe | None = None,
    ) -> None:
        self._registry, self._journal, self._signals = registry, journal, signals
        self._teacher, self._students, self._routes = teacher, students, routes
        self._executor, self._models, self._recipe = executor, models, recipe or Recipe()

    def grow(self, job: Job, *, deadline_s: float | None = None, cancelled: Cancelled | None = None) -> Job:
        """Carry a job through its remaining stages; returns it done. Raises what a stage raises, resumably."""
        gap, work = self._journal.gap(int(job.spec["gap"])), Workspace.of(self._registry.home, job.id).make()
        steps: dict[str, Callable[[Job], Mapping[str, Any]]] = {
            "teach": lambda job: self._teach(gap, work),
            "train": partial(self._train, work, deadline_s, cancelled),
            "examine": lambda job: self._examine(job, gap, work),
            "publish": lambda job: self._publish(gap, work),
        }
        if job.stage == STAGES[0]:
            self._journal.settle_gap(gap.id, GROWING, gap.why)
        with self._journal.renewing(job):
            try:
                while True:
                    found = dict(steps[job.stage](job))
                    following = found.pop("next", None) or _after(job.stage)
                    if following is None:
                        return self._journal.finish(job, **found)
                    job = self._journal.advance(job, following, **found)
            except RejectedError as error:
                return self._reject(job, gap, str(error))

    def _teach(self, gap: GapRecord, work: Workspace) -> Mapping[str, Any]:
        """Examples from the teacher, sieved, and parted into training, validation and a sealed exam."""
        if work.held_out.exists():
            return {}
        recipe, theme = self._recipe, theme_of(gap)
        taught = self._taught(gap, theme, work)
        kept = sieved(taught, sealed=self._sealed(gap.base), limits=recipe.limits)
        if len(kept.kept) < recipe.least_examples:
            dropped = {reason: len(some) for reason, some in kept.dropped.items()}
            raise RejectedError(
                f"expected at least {recipe.least_examples} examples from {self._teacher.name}, got {len(kept.kept)} "
                f"that can be used (dropped: {dropped or 'none'})"
            )
        answer, same = Counter(normalised(one.answer) for one in kept.kept).most_common(1)[0]
        if same > recipe.most_same * len(kept.kept):
            raise RejectedError(
                f"{self._teacher.name} answered {same} of {len(kept.kept)} prompts with {answer[:40]!r}, "
                "which is no skill"
            )
        exam = split(kept.kept, held_out_share=recipe.held_out_share, seed=recipe.seed, least=recipe.least_held_out)
        trial = split(exam.training, held_out_share=recipe.validation_share, seed=recipe.seed + 1)
        for path, some in (
            (work.training, trial.training),
            (work.validation, trial.held_out),
            (work.replay, replay()),
            (work.held_out, exam.held_out),  # last, for it says that all are there
        ):
            _write(path, some)
        return {
            "teacher": self._teacher.name,
            "examples": {"training": len(trial.training), "validation": len(trial.held_out)}
            | {"held_out": len(exam.held_out), "dropped": {why: len(some) for why, some in kept.dropped.items()}},
        }

    def _taught(self, gap: GapRecord, theme: Theme, work: Workspace) -> list[Example]:
        """What the owner corrected, what the teacher says of the gap's prompts, what it writes; kept as it comes."""
        recipe, signals = self._recipe, self._signals.of_gap(gap.id)
        corrected = {one.prompt: one.correction for one in signals if one.correction}
        taught = read_examples(work.taught) if work.taught.exists() else []
        if not taught:
            taught = [Example(prompt=prompt, answer=answer) for prompt, answer in corrected.items()]
        if recipe.asks_prompts:
            known = {one.prompt for one in taught}
            distinct = dict.fromkeys(signal.prompt for signal in signals)
            sealed = {normalised(one.prompt) for one in self._sealed(gap.base)}
            prompts = [one for one in distinct if one not in known and normalised(one) not in sealed]
            prompts = prompts[: max(0, recipe.most_examples - len(taught))]
            for start in range(0, len(prompts), ASKED_AT_ONCE):
                asked = prompts[start : start + ASKED_AT_ONCE]
                answers = self._teacher.answer(asked, theme=theme)
                taught += [Example(prompt=one, answer=said) for one, said in zip(asked, answers, strict=True) if said]
                _write(work.taught, taught)
        if recipe.writes and len(taught) < recipe.most_examples:
            taught += self._teacher.write(
                theme, recipe.most_examples - len(taught), avoid=[one.prompt for one in taught]
            )
            _write(work.taught, taught)
        return taught

    def _train(
        self, work: Workspace, deadline_s: float | None, cancelled: Cancelled | None, job: Job
    ) -> Mapping[str, Any]:
        """The training, in another process, with its steps entered as they come."""
        round_ = int(job.outcome.get("round", 1))
        spec = self._training_job(job.base, work, round_)
        spec.save(work.job(round_))

        def on_step(step: Step) -> None:
            self._journal.step(job, f"{step.phase}-{round_}", step.step, step.steps, step.loss_nats)

        trained = self._executor.run(work.job(round_), on_progress=on_step, deadline_s=deadline_s, cancelled=cancelled)
        return {"steps": trained.steps, "training_s": round(trained.seconds, 1), "stopped": trained.stopped_why}

    def _training_job(self, base: str, work: Workspace, round_: int) -> TrainingJob:
        recipe, encoder = self._recipe, self._is_encoder(base)
        causal = replace(recipe.tuning, targets="all" if recipe.targets == "all" else "mlp")
        tuning = recipe.encoder_tuning if encoder else causal
        share = recipe.replay_share if round_ == 1 else recipe.more_replay
        has_replay = not encoder and share > 0
        validated = work.validation.stat().st_size > 0
        return TrainingJob(
            base=self._models(base),
            objective="contrastive" if encoder else "sft",
            tuning=replace(tuning, seed=recipe.seed + round_ - 1),
            data_url=work.training.as_uri(),
            output_url=work.output(round_).as_uri(),
            probe=Probe() if recipe.targets == "hot" and not encoder else None,
            precision="bfloat16" if recipe.precision == "bfloat16" else "float32",
            # Held to what the bare base says, not to the texts, which are not its own words: applied to everything, an
            # expert then knew as many capitals as the base (72 %), where the texts' loss let them fall to 58 %.
            replay=Replay(data_url=work.replay.as_uri(), share=share, loss_weight=0, kl_weight=1)
            if has_replay
            else None,
            validation=Validation(data_url=work.validation.as_uri()) if validated else None,
        )

    def _examine(self, job: Job, gap: GapRecord, work: Workspace) -> Mapping[str, Any]:
        """The exam and the verdict, after which the candidate's card is on disk, or is trained anew, or rejected."""
        round_ = int(job.outcome.get("round", 1))
        candidate = self._candidate(gap, work, round_)
        ruling = _ruling(work, round_) or self._ruled(gap, work, round_, candidate)
        said, step = ruling["verdict"], ruling["step"]
        if ruling["spending"]["tests"] > self._spending(gap.base).tests:  # a test is counted once, however often tried
            self._journal.keep_note(f"alpha:{gap.base}", ruling["spending"])
        if step == "retrain" and round_ == 1 and not self._is_encoder(gap.base):
            return {"next": "train", "round": 2, "verdict_1": said}
        if step != "publish":
            raise RejectedError("; ".join(said["reasons"]))
        if not work.candidate.exists():
            LoRAFormat.save(candidate.scaled(ruling["scale"]).describe(evaluation={"gate": said}), work.candidate)
        return {"verdict": said}

    def _ruled(self, gap: GapRecord, work: Workspace, round_: int, candidate: LoRACard) -> dict[str, Any]:
        """The exam's end, on disk: verdict, what to do, and the alpha that is left after it."""
        spending = self._spending(gap.base)
        bars = replace(self._recipe.bars, alpha=spending.tonight)
        with self._students.open(gap.base) as student:
            examiner = Examiner(student, self._routes, exam_of(work, student.kind, self._recipe))
            verdict = judge(examiner.measure(candidate), bars)
            result = repaired(partial(examiner.measure, candidate), verdict, bars)
        log.info("examined", gap=gap.name, step=result.step, scale=result.scale, reasons=result.verdict.reasons)
        ruling = {
            "round": round_,
            "step": result.step,
            "scale": result.scale,
            "spending": spending.after(result.verdict).to_json(),
            "verdict": result.verdict.to_json(),
        }
        for path, said in ((work.verdict, ruling["verdict"]), (work.ruling(round_), ruling)):
            with written_whole(path) as file:
                file.write(json.dumps(said, indent=2).encode())
        return ruling

    def _candidate(self, gap: GapRecord, work: Workspace, round_: int) -> LoRACard:
        """The trained adapter as an unsigned card, with statistics for the router."""
        spec = TrainingJob.load(work.job(round_))
        trained = read_trained(work.output(round_), spec.fingerprint())
        if trained is None:
            raise JobError(f"expected a finished training in {work.output(round_)}, got none")
        theme, training = theme_of(gap), read_examples(work.training)
        incumbent = [entry for entry in self._registry.list(name=gap.name) if entry.base_name == gap.base]
        card = LoRACard.from_peft(
            trained.adapter_dir,
            name=gap.name,
            version=self._registry.next_version(gap.name),
            base_name=gap.base,
            description=theme.description,
            domains=list(theme.terms),
            parents=[incumbent[0].digest] if incumbent else [],
            training=_provenance(trained, spec, self._teacher.name, gap)
            | _adapted(spec, read_plan(work.output(round_), spec.fingerprint())),
        )
        prompts = dict.fromkeys([one.prompt for one in training] + [one.prompt for one in self._signals.of_gap(gap.id)])
        held_out = [one.prompt for one in read_examples(work.held_out)]
        sealed = set(held_out)
        return self._routes.describe(card, [one for one in prompts if one not in sealed], held_out)

    def _publish(self, gap: GapRecord, work: Workspace) -> Mapping[str, Any]:
        """Into the registry, from where federation and router take it."""
        card = LoRAFormat.load(work.candidate)
        try:
            entry = self._registry.publish(card)
        except LabelTakenError:  # another card took the version; the file moves on first, so that this is once
            LoRAFormat.save(card.describe(version=self._registry.next_version(gap.name)), work.candidate)
            entry = self._registry.publish(LoRAFormat.load(work.candidate))
        self._journal.settle_gap(gap.id, PUBLISHED, f"published as {entry.name}@{entry.version}", card=entry.digest)
        learnt = {one.id for one in self._signals.of_gap(gap.id)}
        known = self._signals.of_gap(gap.id) + self._signals.queued(gap.base)
        refit(self._registry.database, gap.base, known, learnt=learnt)
        log.info("expert_published", name=entry.name, version=entry.version, digest=entry.digest)
        return {"card": entry.digest, "label": f"{entry.name}@{entry.version}"}

    def _reject(self, job: Job, gap: GapRecord, why: str) -> Job:
        self._journal.settle_gap(gap.id, REJECTED, why)
        self._signals.release(gap.id)
        log.info("expert_rejected", gap=gap.name, why=why)
        return self._journal.finish(job, rejected=why)

    def _spending(self, base: str) -> AlphaSpending:
        noted = self._journal.note(f"alpha:{base}")
        return AlphaSpending(alpha=self._recipe.bars.alpha) if noted is None else AlphaSpending.from_json(noted)

    def _sealed(self, base: str) -> tuple[Example, ...]:
        """What is neither asked nor trained on."""
        anchors = (item for items in self._recipe.anchors_of(self._students.kind(base)).values() for item in items)
        return (*self._recipe.sealed, *anchors, *general_texts())

    def _is_encoder(self, base: str) -> bool:
        return self._students.kind(base) == "encoder"


def _provenance(trained: Trained, spec: TrainingJob, teacher: str, gap: GapRecord) -> dict[str, Any]:
    return {
        "grown_by": "arrowmoe",
        "teacher": teacher,
        "gap": {"prompts": gap.size, "worth": gap.worth},
        "steps": trained.steps,
        "stopped": trained.stopped_why,
        "seconds": round(trained.seconds, 1),
        "tuning": asdict(spec.tuning),
    }


def _adapted(spec: TrainingJob, plan: Plan | None) -> dict[str, Any]:
    """Where the training adapted; `ranks` are of the modules that have another than `rank`."""
    if plan is None:
        return {}
    said = {"targets": plan.name, "modules": len(plan.ranks), "parameters": plan.parameters}
    return {"plan": said | {"rank": spec.tuning.rank, "ranks": plan.rank_pattern(spec.tuning)}}


def _ruling(work: Workspace, round_: int) -> dict[str, Any] | None:
    """The ruling of an exam that was held before its process was killed."""
    path = work.ruling(round_)
    return dict(json.loads(path.read_bytes())) if path.exists() else None


def _after(stage: str) -> str | None:
    at = STAGES.index(stage) + 1
    return STAGES[at] if at < len(STAGES) else None


def _write(path: Path, examples: Sequence[Example]) -> None:
    """Whole or not at all."""
    draft = path.with_suffix(".draft")
    write_examples(draft, examples)
    draft.replace(path)


__all__ = ["STAGES", "Recipe", "RejectedError", "SkillDistiller"]
