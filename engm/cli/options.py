"""The command `engm`, and what its subcommands share: options, paths, messages."""

import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from engm.config import TYPES, RunConfig, alternatives, choices
from engm.errors import InputError, NonFiniteLossError, meant, offered
from engm.values import read

STOPPED = 130  # what shells report of Ctrl-C
QUICK = "--subset 500 --width 8 --epochs 1 --validation-images 100 --test-images 200"


class Command(click.Command):
    """Names every option when one is unknown, and refuses one that is given twice."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        args = self._pairs(ctx, args)
        try:
            *_, order = self.make_parser(ctx).parse_args(args=list(args))
            for item in order:
                if isinstance(item, click.Option) and not item.multiple and order.count(item) > 1:
                    raise click.UsageError(f"{item.opts[0]} is given twice; give it once", ctx)
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            options = [o for o in self.get_params(ctx) if isinstance(o, click.Option)]
            known = [option.opts[0] for option in options]
            there = offered(error.option_name, known, "the options are")
            raise click.UsageError(f"no such option {error.option_name!r}{there}", ctx) from None
        except click.BadOptionUsage as error:
            for option in self.get_params(ctx):
                if error.option_name in option.opts and option.nargs > 1:
                    form = f"{error.option_name} {option.make_metavar(ctx)}"
                    raise click.UsageError(f"{error.message} Write {form}.", ctx) from None
            raise

    def _pairs(self, ctx: click.Context, args: list[str]) -> list[str]:
        # NAME=VALUE is taken for NAME VALUE, too
        options = [o for o in self.get_params(ctx) if isinstance(o, click.Option)]
        pairs = {opt: o.make_metavar(ctx) for o in options if o.nargs == 2 for opt in o.opts}
        names = {opt for option in options for opt in option.opts}
        found: list[str] = []
        for before, word, after in zip(["", *args], args, [*args[1:], ""], strict=False):
            both = str(word).split("=", 1)
            if before in pairs and len(both) == 1 and after in names:
                lost = f"{before} {word} has no value"
                raise click.UsageError(f"{lost}; write {before} {pairs[before]}", ctx)
            found += both if before in pairs and len(both) == 2 else [word]
        return found


class Group(click.Group):
    """Names every command when one is unknown; turns the kit's own errors into one line."""

    command_class = Command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            there = offered(args[0], self.list_commands(ctx), "the commands are")
            raise click.UsageError(f"no such command {args[0]!r}{there}", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # the reader of a pipe has seen enough; click ends in silence
        except KeyboardInterrupt:
            say("\nstopped")
            sys.exit(STOPPED)
        except (InputError, NonFiniteLossError, OSError) as error:
            raise click.ClickException(str(error)) from None


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="engm")
def main() -> None:
    """Learn, test and use ENGM, the outer optimizer for adversarial training.

    The usual order: `engm prepare` fetches a data set (the digits are there), `engm train` makes a
    run directory, `engm evaluate` attacks what it holds, `engm report` puts many of them into one
    table. `engm run` runs a notebook with parameters.
    """
    # Threads that spin while they wait starve each other where another program wants the cores.
    # Read when torch is loaded, which no command has done yet; kernels and workers inherit it.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


class PathType(click.Path):
    """A path; an empty one is the trace of an empty variable, not the present folder."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if value == "":
            self.fail("the path is empty; '.' is the present folder", param, ctx)
        return super().convert(value, param, ctx)


class Count(click.IntRange):
    """A whole number from 1 on."""

    def __init__(self) -> None:
        super().__init__(min=1)

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            self.fail(f"{value!r} is not a whole number from 1 on", param, ctx)


class Setting(click.ParamType):
    """A field of `RunConfig`: one of its literal values, or a number."""

    def __init__(self, name: str) -> None:
        self.kind, self.names = TYPES[name], choices(TYPES[name])
        self.numbers = [kind for kind in (int, float) if kind in alternatives(self.kind)]
        self.name = "|".join([*self.names, *(kind.__name__ for kind in self.numbers)])

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return read(value, self.kind)
        except ValueError:
            words = {int: "a whole number", float: "a number such as 0.03 or 8/255"}
            wanted = [*self.names, *(words[kind] for kind in self.numbers)]
            own = "; the kit knows these data alone, images of your own take a loop of your own"
            hint = own if "cifar10" in wanted else ""
            message = f"{value!r} is not {' or '.join(wanted)}{hint}{meant(value, self.names)}"
            self.fail(message, param, ctx)

    def get_metavar(self, param: click.Parameter, ctx: Any = None) -> str:
        return f"[{self.name}]" if len(self.names) > 0 else self.name.upper()


def say(text: str) -> None:
    """Says what a command is about to do, or what can come next, beside its result."""
    click.echo(text, err=True)


def duration(seconds: float) -> str:
    """Returns a time in words, in the largest unit of which there are two or more."""
    for unit, length in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def quoted(path: Path) -> str:
    """Returns a path as a shell takes it."""
    return shlex.quote(click.format_filename(path))


@contextmanager
def stoppable(then: str) -> Iterator[None]:
    """Lets Ctrl-C end a block, and the command, with a sentence: what is kept, how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        logging.getLogger("asyncio").disabled = True  # of what waited for a kernel that is gone
        say(f"\nstopped; {then}")
        sys.exit(STOPPED)


def warn_of_hours(config: RunConfig, device: str, quick: str = QUICK) -> None:
    """Says so where a large network is to see all training or test images on a CPU.

    `quick` are the options of a quick try.
    """
    from engm.data import SMALL
    from engm.device import pick_device

    large = config.subset is None or (config.test_images is None and config.subset >= SMALL)
    whole = config.model != "small_cnn" and large
    if whole and pick_device(device).type == "cpu":
        say(f"all images on a CPU take hours or more; a quick try: {quick}")


def option_of(setting: str) -> str:
    """Returns how a command writes a field of `RunConfig`: with dashes."""
    return f"--{setting.replace('_', '-')}"


def with_options(text: str) -> str:
    """Returns a message about settings of `RunConfig` as one about the options of a command."""
    for name in TYPES:
        text = re.sub(rf"\b{name}=(?=\S)", f"{option_of(name)} ", text)
        if "_" in name:
            text = re.sub(rf"\b{name}\b", option_of(name), text)
    return text


def once(pairs: Iterable[tuple[str, Any]], instead: str) -> dict[str, Any]:
    """Returns names and values as a dictionary; a name that is there twice is an `InputError`."""
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise InputError(f"{name} is set twice; {instead}")
        values[name] = value
    return values


def settings_options(
    command: Callable[..., Any], names: Collection[str] = TYPES
) -> Callable[..., Any]:
    """Gives a command one option for each field of `RunConfig`, or for those in `names`."""
    for item in reversed([item for item in fields(RunConfig) if item.name in names]):
        flag = option_of(item.name)
        is_flag = TYPES[item.name] is bool
        option = click.option(
            f"{flag}/--no-{flag[2:]}" if is_flag else flag,
            item.name,
            type=None if is_flag else Setting(item.name),
            default=item.default,
            show_default=item.default is not None,
            help=item.metadata["help"],
        )
        command = option(command)
    return command


device_option = click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ..."
)
data_root_option = click.option(
    "--data-root", type=PathType(), help="where `engm prepare` put the datasets"
)
save_option = click.option(
    "--save-adversarial/--no-save-adversarial", default=True, show_default=True,
    help="keep the adversarial test examples",
)  # fmt: skip
notebooks_option = click.option(
    "--notebooks", "folder", type=PathType(), default=Path("notebooks"), show_default=True,
    help="folder of the notebooks",
)  # fmt: skip
