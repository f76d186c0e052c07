"""Who teaches in a run, and what its vectors and negatives depend on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nearfield.batching.config import needs_vectors
from nearfield.data.vectors import VERSION as VECTORS_VERSION
from nearfield.encoders.base_prompts import base_prompts
from nearfield.encoders.build import ModelSource, locate
from nearfield.errors import BadInputError
from nearfield.files import fingerprint, hash_file
from nearfield.mining.config import (
    CrossEncoderTeacher,
    DenseTeacher,
    EnsembleTeacher,
    SentenceTransformerTeacher,
    TeacherConfig,
    VectorsTeacher,
    dense_teachers,
)
from nearfield.mining.negatives import VERSION as NEGATIVES_VERSION

if TYPE_CHECKING:
    from nearfield.recipe import Recipe


def mining_teacher(recipe: Recipe) -> TeacherConfig:
    """Who scores candidates: the one of ``mining``, else the recipe's, else the model that the recipe trains from."""
    own = recipe.mining.teacher if recipe.mining else None
    return own or recipe.teacher or SentenceTransformerTeacher()


def planning_teacher(recipe: Recipe) -> DenseTeacher | None:
    """Whose vectors the planner gets: the first of the recipe's teacher that makes any; None where it gets none."""
    if recipe.teacher is None:
        return SentenceTransformerTeacher() if needs_vectors(recipe.batches) else None
    # That there is one where the planner cannot do without is checked with the recipe.
    return next(iter(dense_teachers(recipe.teacher)), None)


def guide_teacher(recipe: Recipe) -> DenseTeacher | None:
    """Whose vectors the objective gets; None where it asks for none."""
    if not recipe.objective.needs_guide:
        return None
    if recipe.guide is not None:
        return recipe.guide
    # That the recipe's teacher makes vectors is checked with the recipe.
    return SentenceTransformerTeacher() if recipe.teacher is None else next(iter(dense_teachers(recipe.teacher)), None)


def teachers_of_vectors(recipe: Recipe) -> list[DenseTeacher]:
    """All teachers whose vectors the run needs, each once."""
    found = dense_teachers(mining_teacher(recipe)) if recipe.mining else []
    for teacher in (planning_teacher(recipe), guide_teacher(recipe)):
        if teacher is not None and teacher not in found:
            found.append(teacher)
    return found


def located(teacher: SentenceTransformerTeacher, recipe: Recipe) -> ModelSource:
    """The teacher's model, found without loading it."""
    if teacher.model is None:
        return locate(recipe.encoder.model, recipe.encoder.revision)
    return locate(teacher.model, teacher.revision)


def teacher_prompts(teacher: SentenceTransformerTeacher, recipe: Recipe) -> dict[str, str]:
    """Role -> the text that the teacher wants before an item: the recipe's, else the model's own for retrieval."""
    own = base_prompts(
        located(teacher, recipe).path, recipe.encoder.revision if teacher.model is None else teacher.revision
    )
    stated = {"query": teacher.prompts.query, "document": teacher.prompts.document}
    return {role: own.of("Retrieval", role) or "" if text is None else text for role, text in stated.items()}


def identity(teacher: TeacherConfig, recipe: Recipe) -> Any:
    """What a teacher's scores depend on, as a JSON-able value."""
    if isinstance(teacher, SentenceTransformerTeacher):
        source = located(teacher, recipe)
        length = teacher.max_length or (recipe.encoder.max_length if teacher.model is None else None)
        code = recipe.encoder.trust_remote_code if teacher.model is None else teacher.trust_remote_code
        parts = [teacher.kind, source.name, source.content, length, teacher_prompts(teacher, recipe)]
        return [*parts, *(["trust_remote_code"] if code else [])]
    if isinstance(teacher, VectorsTeacher):
        files = [teacher.documents, *([teacher.queries] if teacher.queries else [])]
        listed = [file.with_suffix(".ids.txt") for file in files]
        for file in files:
            if not file.is_file():
                raise BadInputError("this file of vectors does not exist", where=str(file))
        zeros = ["zeros"] if teacher.zeros else []
        return [teacher.kind, [hash_file(file) for file in [*files, *listed] if file.is_file()], *zeros]
    if isinstance(teacher, CrossEncoderTeacher):
        source = locate(teacher.model, teacher.revision)
        settings = teacher.identity(exclude={"model", "revision", "retrieve"})
        return [teacher.kind, source.name, source.content, settings, identity(teacher.retrieve, recipe)]
    if isinstance(teacher, EnsembleTeacher):
        members = [identity(member, recipe) for member in teacher.members]
        return [teacher.kind, teacher.fusion, teacher.weights, members]
    return teacher.identity()


def vectors_fingerprint(teacher: DenseTeacher, recipe: Recipe, data: str, sources: list[str]) -> str:
    """Of a teacher's vectors of the items of a run."""
    return fingerprint(
        {
            "version": VECTORS_VERSION,
            "data": data,
            "teacher": identity(teacher, recipe),
            "sources": sources,
            "split": recipe.split,
        }
    )


def negatives_fingerprint(recipe: Recipe, data: str, sources: list[str]) -> str:
    """Of the negatives mined before the training begins."""
    assert recipe.mining is not None
    # Whether the data's own negatives stay is decided when batches are planned, how negatives change in training.
    settings = recipe.mining.identity(exclude={"teacher", "memory_mib", "explicit", "during"})
    return fingerprint(
        {
            "version": NEGATIVES_VERSION,
            "data": data,
            "teacher": identity(mining_teacher(recipe), recipe),
            "mining": settings,
            "sources": sources,
            "split": recipe.split,
            "seed": recipe.seed,
            "generation": 0,
        }
    )
