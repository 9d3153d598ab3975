"""Judging a model by its answers."""

from moda_ext.evaluation.answers import forced_matches, generate_answers, normalize
from moda_ext.evaluation.evaluate import (
    Answer,
    Comparison,
    Evaluation,
    LanguageBias,
    TaskResult,
    compare,
    evaluate,
    language_bias,
)
from moda_ext.evaluation.judge import ASPECTS, Judge, MalformedVerdict, OpenAIJudge, judge_answers
from moda_ext.evaluation.report import summarize, write_answers, write_report
from moda_ext.evaluation.tasks import Task, read_questions, read_tasks

__all__ = [
    "ASPECTS",
    "Answer",
    "Comparison",
    "Evaluation",
    "Judge",
    "LanguageBias",
    "MalformedVerdict",
    "OpenAIJudge",
    "Task",
    "TaskResult",
    "compare",
    "evaluate",
    "forced_matches",
    "generate_answers",
    "judge_answers",
    "language_bias",
    "normalize",
    "read_questions",
    "read_tasks",
    "summarize",
    "write_answers",
    "write_report",
]
