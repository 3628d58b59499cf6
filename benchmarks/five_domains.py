"""What probing says along a real chain of upgrades, and how good its verdict is: tables, plots, from a study's runs.

    python benchmarks/five_domains.py --make-control DIR --like MODEL      a base with random weights, before the study
    python benchmarks/five_domains.py studies/five_domains.yaml [--jobs N] [--plots DIR] [--quick] [--json]   after it

Every set of outdated weights that the study tuned on the chain's first base is probed on each later base and on the
control (`recyclable probe`, finished ones are kept below the study's `out`); where it was tuned on the new base as
well, a path of 26 points leads there. Figures:
- `compatibility`: dev score of outdated weights by base; `left`, the share of their worth;
- `paths`: the barrier between weights tuned before and after an upgrade, and its share of what the old model knows;
- `steps`: the same barrier, weights unchanged, over each single upgrade, beside how far its text is from the task's and
  from the text before (Jensen-Shannon divergence of token frequencies, bits);
- `similarity`: means over heads, layers and neurons, descendants and control;
- `projection`: test score of `project` and `apply`, and what it lacks or wins;
- `verdict`: see verdict_fit.py.
--quick takes 50 examples and 5 points a path.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import verdict_fit
from scipy.spatial.distance import jensenshannon
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

from recyclable.analysis.connectivity import POINTS, barrier, connectivity, path_points
from recyclable.analysis.similarity import Similarity, plot
from recyclable.carrying.carried import Carried
from recyclable.config.run_file import load_config, make_config
from recyclable.data.files import read_rows
from recyclable.models.tasks import outdated_model
from recyclable.recipes.probe import RESULT, probe
from recyclable.recipes.probe_settings import ProbeSettings
from recyclable.recipes.probe_task import SPLIT, examples_of, knowing_nothing
from recyclable.recipes.study import collect
from recyclable.recipes.study_plan import base_folder
from recyclable.recipes.study_settings import StudySettings
from recyclable.report.compare import table
from recyclable.report.study_report import results
from recyclable.tasks.parts.fewshot import limit
from recyclable.tasks.parts.task import Task, load_task
from recyclable.weights.adapted import AdaptedWeights
from recyclable.weights.base import Base
from recyclable.weights.strict_json import read_json

EXPERIMENT, PROJECTION = "few_shot", "projection"
DOCUMENTS = 2000
"""Of each corpus, and of each task, whose token frequencies are compared."""


@dataclass(frozen=True)
class Chain:
    """A study of one chain of bases and a control."""

    config: StudySettings
    examples: int
    points: int
    end_points: int
    folder: Path
    """Where probes are kept."""

    @property
    def bases(self) -> list[str]:
        """The chain, oldest first."""
        names = list(self.config.bases)
        return [names[0], *(n for n in names[1:] if self.config.bases[n].parent in names)]

    @property
    def control(self) -> str | None:
        """The base that descends from none of the chain's."""
        others = [name for name in self.config.bases if name not in self.bases]
        return others[0] if others else None

    @property
    def tunings(self) -> list[str]:
        """Kinds of tuning."""
        return list(dict.fromkeys(tuning for edge in self.config.edges for tuning in edge.tuning))

    def base(self, name: str) -> str:
        """A base's directory."""
        return base_folder(self.config, name)

    def weights(self, base: str, task: str, tuning: str) -> Path:
        """Where the study tuned a task on a base."""
        return self.config.out / "tuned" / base / task / tuning / f"seed{self.config.seeds[0]}"

    def pairs(self) -> list[tuple[str, str, str]]:
        """(task, tuning, new base) of all that can be probed now."""
        new_bases = [*self.bases[1:], *([self.control] if self.control else [])]
        edges = {(edge.new, tuning) for edge in self.config.edges for tuning in edge.tuning}
        return [
            (task, tuning, new)
            for task in self.config.tasks
            for tuning in self.tunings
            for new in new_bases
            if (new != self.control or (new, tuning) in edges)
            and Path(self.base(new), "lineage.json").is_file()
            and Path(self.weights(self.bases[0], task, tuning), "manifest.json").is_file()
        ]


def main() -> None:
    """Make a control, or probe and print tables, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", help="the study's file")
    parser.add_argument("--make-control", type=Path, metavar="DIR", help="where a base with random weights goes")
    parser.add_argument("--like", metavar="MODEL", help="whose shape and tokenizer it has")
    parser.add_argument("--jobs", type=int, default=1, help="processes that probe, one thread each (default 1)")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="where plots go")
    parser.add_argument("--quick", action="store_true", help="fewer examples and points")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    arguments = parser.parse_args()
    if arguments.make_control:
        make_control(arguments.make_control, arguments.like or parser.error("--make-control needs --like"))
        return
    config = load_config(StudySettings, arguments.study or parser.error("name the study, or --make-control"))
    sizes = (50, 5, 5, config.out / "probes-quick") if arguments.quick else (300, 11, POINTS, config.out / "probes")
    chain = Chain(config, *sizes)
    figures = measure(chain, arguments.jobs)
    if arguments.plots:
        from five_domains_plots import draw

        draw(figures, arguments.plots)
        plot(figures["heads"], arguments.plots / "five_domains-heads.png")
    heads = figures.pop("heads")
    figures.pop("paths_by_point")
    if arguments.json:
        print(json.dumps({**figures, "heads": {name: of.as_dict() for name, of in heads.items()}}))
        return
    for name, rows in figures.items():
        print(f"\n## {name}\n")
        print(table(rows) if isinstance(rows, list) and rows else json.dumps(rows, indent=1))


def make_control(folder: Path, like: str) -> None:
    """A masked language model with random weights, in the shape and with the tokenizer of another."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(like, trust_remote_code=False)
    AutoModelForMaskedLM.from_config(config, trust_remote_code=False).save_pretrained(folder)
    AutoTokenizer.from_pretrained(like, trust_remote_code=False).save_pretrained(folder)


def measure(chain: Chain, jobs: int) -> dict[str, Any]:
    """Probe what is not probed yet, a few processes at a time, and bring the figures together."""
    pairs = chain.pairs()
    ends = [pair for pair in pairs if (chain.weights(pair[2], *pair[:2]) / "manifest.json").is_file()]
    links = list(pairwise(chain.bases))
    steps = [(task, tuning, link) for task, tuning, new in pairs for link in links if link[1] == new]
    with ProcessPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        probed = dict(zip(pairs, pool.map(_probe, [chain] * len(pairs), pairs), strict=True))
        joined = dict(zip(ends, pool.map(_ends, [chain] * len(ends), ends), strict=True))
        stepped = dict(zip(steps, pool.map(_step, [chain] * len(steps), steps), strict=True))
    tests = _tests(chain.config)
    return {
        "distance": _means(probed, lambda evidence: evidence["distance"]["whole"]),
        "compatibility": _compatibility(probed, chain),
        "paths": _paths(joined),
        "paths_by_point": {key: found["evidence"]["connectivity"] for key, found in joined.items()},
        "steps": _steps(stepped, chain),
        "similarity": _means(probed, lambda evidence: evidence["similarity"]),
        "heads": _heads(probed, chain),
        "projection": _projection(tests),
        "verdict": verdict_fit.measure([_pair(key, found, tests) for key, found in probed.items() if key in tests]),
    }


def _probe(chain: Chain, pair: tuple[str, str, str], to: Path | None = None, points: int = 0) -> dict[str, Any]:
    task, tuning, new = pair
    out = chain.folder / ("ends" if to else "unchanged") / new / task / tuning
    if (out / RESULT).is_file():
        return read_json(out / RESULT)
    content = {
        "weights": str(chain.weights(chain.bases[0], task, tuning)),
        "base": chain.base(new),
        "old_base": chain.base(chain.bases[0]),
        "task": str(chain.config.tasks[task]),
        "examples": chain.examples,
        "points": points or chain.points,
        "out": str(out),
        "allow_unrelated": new == chain.control,
        **({"to": str(to)} if to else {}),
    }
    return probe(make_config(ProbeSettings, content, "probe"), resume=True)[0]


def _ends(chain: Chain, pair: tuple[str, str, str]) -> dict[str, Any]:
    return _probe(chain, pair, chain.weights(pair[2], *pair[:2]), chain.end_points)


def _step(chain: Chain, step: tuple[str, str, tuple[str, str]]) -> dict[str, Any]:
    """The path over a single upgrade, outdated weights unchanged at both of its ends."""
    name, tuning, link = step
    first = Base(chain.base(chain.bases[0]))
    weights, task = AdaptedWeights(chain.weights(chain.bases[0], name, tuning)), load_task(chain.config.tasks[name])
    split = limit(task.splits[SPLIT], chain.examples, weights.manifest.settings["seed"])
    file = chain.folder / "steps" / "-".join(link) / name / f"{tuning}.json"
    bases = [Base(chain.base(base)) for base in link]
    rows = connectivity(
        [outdated_model(Carried(weights, first, base), task, weights.manifest.settings["seed"]) for base in bases],
        {SPLIT: examples_of(task, split, weights, bases[1])},
        task,
        points=path_points(chain.points),
        file=file,
        key=json.dumps([name, tuning, link, chain.points]),
    )
    known = knowing_nothing(task, examples_of(task, split, weights, bases[1]))["loss"] - rows[0][SPLIT]["loss"]
    height = barrier([row["mu"] for row in rows], [row[SPLIT]["loss"] for row in rows])
    return {"barrier": height, "of_known": height / known if known > 0 else None}


def _tests(config: StudySettings) -> dict[tuple[str, str, str], dict[str, dict[str, float]]]:
    """(task, tuning, new base) -> method -> test score and training examples seen, of what is finished."""
    found: dict[tuple[str, str, str], dict[str, dict[str, float]]] = {}
    for row in results(collect(config)):
        if row["experiment"] in (EXPERIMENT, PROJECTION):
            of = found.setdefault((row["task"], row["tuning"], row["new"]), {})
            of[row["method"]] = {"test": row["test"], "examples": row["examples"]}
    return found


def _pair(key: tuple[str, str, str], found: dict[str, Any], tests: dict) -> verdict_fit.Pair:
    scores = {method: of for method, of in tests[key].items() if method in verdict_fit.METHODS}
    return verdict_fit.Pair(*key, found["evidence"], scores)


def _worth(told: dict[str, Any], when: str) -> float:
    return told[when][told["metric"]]


def _compatibility(probed: dict, chain: Chain) -> list[dict[str, Any]]:
    """A row for each task and tuning, a column for each base: score, and share of the worth that is left."""
    rows = []
    for task, tuning in dict.fromkeys((task, tuning) for task, tuning, _ in probed):
        of = {new: p["evidence"]["compatibility"] for (t, k, new), p in probed.items() if (t, k) == (task, tuning)}
        told = next(iter(of.values()))
        old, floor = _worth(told, "old"), _worth(told, "majority")
        row: dict[str, Any] = {"task": task, "tuning": tuning, "majority": floor, chain.bases[0]: old}
        row.update({new: _worth(told, "new") for new, told in of.items()})
        row.update({f"left {new}": (_worth(told, "new") - floor) / (old - floor) for new, told in of.items()})
        rows.append(row)
    return rows


def _paths(joined: dict) -> list[dict[str, Any]]:
    """Barriers between weights tuned on both bases; for adapters also of the adapter alone, on the new base."""
    rows = []
    for (task, tuning, new), found in joined.items():
        told, path = found["evidence"]["compatibility"], found["evidence"]["connectivity"]
        known = told["majority"]["loss"] - told["old"]["loss"]
        row = {"task": task, "tuning": tuning, "new": new, "first": path["metric"][0], "last": path["metric"][-1]}
        row |= {"lowest": min(path["metric"]), "barrier": path["barrier"], "of_known": path["barrier"] / known}
        alone = path.get("adapter_alone")
        rows.append({**row, "adapter_alone": alone and alone["barrier"] / known})
    return rows


def _steps(stepped: dict, chain: Chain) -> list[dict[str, Any]]:
    """Barriers over single upgrades, beside distances of texts."""
    if not stepped:
        return []
    count = _counter(Path(chain.base(chain.bases[0])))
    corpora = {name: count(_documents(chain.config.bases[name].corpus.train)) for name in chain.bases}
    tasks = {name: count(_texts(load_task(task))) for name, task in chain.config.tasks.items()}
    return [
        {
            "task": task,
            "tuning": tuning,
            "upgrade": "-".join(link),
            "task_to_text": _divergence(tasks[task], corpora[link[1]]),
            "text_to_text": _divergence(corpora[link[0]], corpora[link[1]]),
            **found,
        }
        for (task, tuning, link), found in stepped.items()
    ]


def _counter(folder: Path) -> Callable[[list[str]], np.ndarray]:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)

    def count(texts: list[str]) -> np.ndarray:
        """Frequencies of tokens."""
        seen = Counter(token for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] for token in ids)
        counts = np.bincount(list(seen), weights=list(seen.values()), minlength=len(tokenizer))
        return counts / counts.sum()

    return count


def _documents(corpus: str) -> list[str]:
    return [row["text"] for _, row in islice(read_rows(Path(corpus), ["text"]), DOCUMENTS)]


def _texts(task: Task) -> list[str]:
    return limit(task.splits["train"], DOCUMENTS, 0).texts


def _divergence(p: np.ndarray, q: np.ndarray) -> float:
    """Jensen-Shannon, of two distributions in bits: 0 the same, 1 nothing in common."""
    return float(jensenshannon(p, q, base=2) ** 2)


def _means(probed: dict, of: Callable[[dict[str, Any]], dict[str, Any]]) -> list[dict[str, Any]]:
    """Base by base, the means of what the probes of fully tuned weights tell: over tasks, and over lists."""
    rows = []
    for new in dict.fromkeys(new for _, _, new in probed):
        told = [of(p["evidence"]) for (_, tuning, n), p in probed.items() if (n, tuning) == (new, "full")]
        if told:
            rows.append({"base": new, **{name: float(np.mean([each[name] for each in told])) for name in told[0]}})
    return rows


def _heads(probed: dict, chain: Chain) -> dict[str, Similarity]:
    """Base -> how alike it is to the first, on the first task's texts."""
    task = next(iter(chain.config.tasks))
    return {
        f"{chain.bases[0]} and {new}": Similarity(**{k: np.array(v) for k, v in p["evidence"]["similarity"].items()})
        for (t, tuning, new), p in probed.items()
        if t == task and tuning == "full"
    }


def _projection(tests: dict) -> list[dict[str, Any]]:
    rows = []
    for (task, tuning, new), of in tests.items():
        if {"project", "apply"} <= of.keys():
            scores = {method: of[method]["test"] for method in ("apply", "project")}
            gain = 100 * (scores["project"] - scores["apply"])
            rows.append({"task": task, "tuning": tuning, "new": new, **scores, "gain_points": gain})
    return rows


if __name__ == "__main__":
    main()
