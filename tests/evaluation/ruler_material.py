"""Small files in the forms that RULER's tasks read."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

ESSAY = "It rained. The dog slept! Was it\n late?   Nobody knew. "
SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": "Ann has a cat.",
                    "qas": [
                        {"question": "Who has a cat?", "answers": [{"text": "Ann"}, {"text": "It is Ann"}]},
                        {"question": "Why?", "is_impossible": True, "answers": []},
                    ],
                },
                {"context": "Ann is tall.", "qas": []},
            ]
        },
        {
            "paragraphs": [
                {"context": "Bo has a dog.", "qas": [{"question": "Who has a dog?", "answers": [{"text": "Bo"}]}]}
            ]
        },
    ]
}
HOTPOT = [
    {
        "question": "Which is older?",
        "answer": "Oslo",
        "context": [["Oslo", ["Oslo is old.", " It is big."]], ["Bonn", ["Bonn is new."]]],
    },
    {"question": "Who sang?", "answer": "yes", "context": [["Song", ["A song."]]]},
]


def write_material(folder: Path) -> dict[str, str]:
    """Write the files; returns the fields that name them."""
    words = folder / "words"
    words.mkdir()
    for name, end in {"nounlist": "t", "adjectivelist": "d", "verblist": "s"}.items():
        lines = [f"{first}{vowel}{end}" for first, vowel in product("bcdfghlmnp", "aeiou")]
        (words / f"{name}.txt").write_text("\n".join(lines) + "\n")
    (folder / "essay.txt").write_text(ESSAY)
    (folder / "squad.json").write_text(json.dumps(SQUAD))
    (folder / "hotpot.json").write_text(json.dumps(HOTPOT))
    files = {"haystack": "essay.txt", "squad": "squad.json", "hotpot": "hotpot.json", "words": "words"}
    return {field: str(folder / name) for field, name in files.items()}
