"""What moda_ext_local.yaml names."""

from PIL import Image


def pictures(doc):
    return [Image.open(name) for name in doc["images"]]


def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def score(doc, results):
    return {"same": float(results[0] == doc["answer"])}
