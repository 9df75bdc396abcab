"""The entry point of `progrpo`: it runs the command that the arguments name, and turns errors into exit codes."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise, takewhile

from progrpo import __version__
from progrpo.cli.command import Command
from progrpo.cli.evaluation_commands import Eval
from progrpo.cli.model_commands import Pretrain, Sample, Studio
from progrpo.cli.options import parse_options
from progrpo.cli.other_commands import Import, ServeReward
from progrpo.cli.output import UnreadOutputError, columns, show
from progrpo.cli.page_commands import Board, Compare, Report
from progrpo.cli.preference_commands import Label, PairsCheck, PairsConvert, RewardModelEval, RewardModelTrain
from progrpo.cli.publish_commands import Export, Push
from progrpo.cli.repro_commands import Repro
from progrpo.cli.run_commands import Plan, Recipes, Resume, Train
from progrpo.config import Config, PlanSettings
from progrpo.durable import DiskError, LockLostError
from progrpo.messages import FaultsError, nearest, quoted
from progrpo.recipes import RECIPES, load_recipe
from progrpo.registry import is_users_own
from progrpo.rollout.plan import PRESETS
from progrpo.rollout.settings import unread_fields
from progrpo.streams import occupy_standard_descriptors, release_standard_descriptors, tolerant_streams
from progrpo.training.errors import Interrupted, LostProcessError, SelfCheckError

COMMANDS: dict[str, type[Command]] = {
    "train": Train,
    "recipes": Recipes,
    "import": Import,
    "plan": Plan,
    "sample": Sample,
    "eval": Eval,
    "report": Report,
    "compare": Compare,
    "board": Board,
    "studio": Studio,
    "export": Export,
    "push": Push,
    "label": Label,
    "pairs check": PairsCheck,
    "pairs convert": PairsConvert,
    "repro": Repro,
    "pretrain": Pretrain,
    "serve-reward": ServeReward,
    "reward-model train": RewardModelTrain,
    "reward-model eval": RewardModelEval,
}

# --- running a command ------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    0: done. 1: the run stopped itself, or its result could not be printed. 2: a user's mistake, one sentence on stderr.
    128 + the signal's number: a signal ended it.
    """
    occupy_standard_descriptors()
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # or the hub's client reports every attempt to reach it
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # or its import warns of picture formats we do not use
    try:
        with tolerant_streams():
            return _run(list(sys.argv[1:] if argv is None else argv))
    finally:
        release_standard_descriptors()


def _run(args: list[str]) -> int:
    """Run the command and print its error; the exit code."""
    try:
        _parse(args)()
    except (SelfCheckError, DiskError, LostProcessError, LockLostError) as error:
        print(f"progrpo: stopped: {_one_line(error)}", file=sys.stderr)
        return 1
    except ValueError as error:
        text = str(error) if isinstance(error, FaultsError) else _one_line(error)
        print(f"progrpo: error: {text}", file=sys.stderr)
        return 2
    except UnreadOutputError as error:
        print(error, end="", file=sys.stderr)
        return error.code
    except Interrupted as stopped:
        print(f"progrpo: {stopped}", file=sys.stderr)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        print("progrpo: interrupted", file=sys.stderr)
        return 130
    return 0


def _one_line(error: Exception) -> str:
    """The text of an error in one line; texts of libraries and of the user's rewards may have several."""
    return " ".join(str(error).split())


# --- finding the command ----------------------------------------------------------------------------------------------


def _parse(args: list[str]) -> Callable[[], None]:
    """The action that the arguments ask for."""
    if not args or args[0] in ("-h", "--help"):
        return lambda: show(_help())
    if args[0] == "--version":
        return lambda: show(f"progrpo {__version__}")
    command, rest = _command(args)
    _require_current_folder()
    if command == "train" and any(arg.partition("=")[0] == "--resume" for arg in rest):
        return parse_options(Resume, rest, "progrpo train --resume").run
    if command == "train":
        return _parse_with_recipe(Train, command, rest).run
    if command == "plan":
        return _parse_with_recipe(Plan, command, rest).run
    return parse_options(COMMANDS[command], rest, f"progrpo {command}").run


def _command(args: Sequence[str]) -> tuple[str, list[str]]:
    """The command, whose name may have two words, and the arguments after it."""
    for words in (2, 1):
        if (command := " ".join(args[:words])) in COMMANDS:
            return command, list(args[words:])
    group = [name.partition(" ")[2] for name in COMMANDS if name.startswith(f"{args[0]} ")]
    if group:
        raise ValueError(f"progrpo {args[0]} must be followed by {' or '.join(group)}")
    raise ValueError(f"{quoted(args[0])} is no command of progrpo ({', '.join(COMMANDS)}){nearest(args[0], COMMANDS)}")


def _help() -> str:
    lines = columns({name: (kind.__doc__ or "").strip() for name, kind in COMMANDS.items()})
    return (
        "usage: progrpo COMMAND [OPTIONS]\n\n"
        "Online RL of text-to-image models with pruning inside the sampling process.\n\n"
        f"{lines}\n\nprogrpo COMMAND --help says more; progrpo --version prints the version."
    )


def _require_current_folder() -> None:
    """Raise ValueError where the current folder is gone: torch's libraries would end the process as they are loaded."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ValueError("the current folder is gone; change to one that is there") from None


def _parse_with_recipe(kind: type[Train] | type[Plan], command: str, args: list[str]) -> Command:
    """Parse `RECIPE [OPTIONS]`: the recipe comes first, since it holds the defaults of all options."""
    if {"-h", "--help"} & set(args[:1]):
        return parse_options(kind, ["--help"], f"progrpo {command} RECIPE", kind(config=Config()))
    if not args or args[0].startswith("-"):
        raise ValueError(
            f"a recipe ({', '.join(RECIPES)}), a config file or a run folder comes first: progrpo {command} RECIPE ..."
        )
    _require_quotes(command, args)
    config = load_recipe(args[0])
    if _named_plan(command, args, config.plan) not in ("recipe", "custom"):
        # the named plan has a group and points of its own, so those of the recipe's custom plan must go
        own = PlanSettings()
        plan = replace(config.plan, group_size=own.group_size, prune=own.prune, final_keep=own.final_keep)
        config = replace(config, plan=plan)
    return parse_options(kind, args[1:], f"progrpo {command} {args[0]}", kind(config=config))


def _require_quotes(command: str, args: Sequence[str]) -> None:
    """Raise ValueError where the words before the options are a path that a shell has cut at its spaces."""
    words = list(takewhile(lambda word: not word.startswith("--"), args))
    path = " ".join(words)
    if len(words) > 1 and not os.path.exists(words[0]) and os.path.exists(path):
        raise ValueError(f"a path with spaces must stand in quotes: progrpo {command} {shlex.quote(path)} ...")


def _named_plan(command: str, args: Sequence[str], own: PlanSettings) -> str:
    """The plan that `--plan.preset` names, or `--plan` of `plan`; `recipe` where neither is given.

    ValueError if both are given, for a custom plan without any of its fields, and for these fields of another plan.
    """
    words = [word for arg in args for word in arg.split("=", 1)]
    options = ("--plan", "--plan.preset") if command == "plan" else ("--plan.preset",)
    given = {option: value for option, value in pairwise(words) if option in options}
    if len(given) > 1:
        raise ValueError("--plan and --plan.preset name a plan each; leave one out")
    option, preset = next(iter(given.items()), ("", "recipe"))
    fields = ("--plan.group-size", "--plan.prune", "--plan.final-keep")
    described = {word.replace("_", "-") for word in words} & {*fields}
    if preset == "custom" and own.preset != "custom" and not described:
        raise ValueError(f"{option} custom needs the plan: give {', '.join(fields[:-1])} or {fields[-1]}")
    in_force = own.preset if preset == "recipe" else preset
    # their values do not tell: a group of 24, or no points, is the default
    if described and (in_force in PRESETS or is_users_own(in_force)):
        raise unread_fields(in_force)
    return preset
