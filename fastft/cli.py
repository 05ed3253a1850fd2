"""The command line: one command a verb, each a few lines over the function of the same name.

Exit codes: 0 done, 1 the answer is no, 2 the input is wrong, 3 could not finish, 130 interrupted.
With --json, standard output carries one JSON object and nothing else; everything a person reads
goes to standard error.
"""

from __future__ import annotations

import _thread
import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from fastft import __version__
from fastft.bench.command import app as bench_app
from fastft.console import (
    LONGEST_MESSAGE,
    answer_descriptor,
    claimed_stdout,
    print_result,
    quiet_libraries,
    robust_streams,
    say_error,
    then,
)
from fastft.errors import PANIC, AnswerIsNoError, FastFTError, explained, one_of
from fastft.inference.sampling import Sampling
from fastft.training import ranks
from fastft.verbs import MAX_KL, Certificate

app = typer.Typer(
    name="fastft",
    help="Fine-tune language models with LoRA and QLoRA: exact, planned, resumable, with exports "
    "that carry a proof.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigFile = Annotated[Path, typer.Argument(help="the run's YAML config (fastft init writes one)")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="override a setting: --set lora.r=32 (repeatable), or lora.r=32 after the config",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on standard output")]
RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="a run folder, an adapter folder or a model folder")
]
Base = Annotated[
    str | None, typer.Option("--base", help="base model of an adapter that does not name it")
]
Out = Annotated[
    Path | None, typer.Option("--out", help="where exports go (default: the run's export/)")
]
Talker = Annotated[
    str, typer.Argument(metavar="RUN", help="a run, adapter or model folder, or a .gguf file")
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")]
Loras = Annotated[
    list[str] | None, typer.Option("--lora", help="adapter GGUF on a base GGUF (repeatable)")
]
GpuLayers = Annotated[
    str, typer.Option("--gpu-layers", help="layers of a GGUF on the GPU: auto or a number")
]
Context = Annotated[int | None, typer.Option("--n-ctx", help="context of a GGUF in tokens")]


def main() -> NoReturn:
    """Run the command line and leave with its exit code."""
    robust_streams()
    with contextlib.suppress(ValueError):  # not the main thread: somebody calls us from another
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        repeat_swallowed_interrupts()
    try:
        code = run(sys.argv[1:])
    except KeyboardInterrupt:  # while an error was being told: a launcher ends all processes
        code = 130
    sys.stdout.flush()
    sys.stderr.flush()
    # What torch and llama.cpp leave behind must neither hold up the shell nor crash on the way out.
    os._exit(code)


def repeat_swallowed_interrupts() -> None:
    """Let an interrupt that Python swallows come again; SIGTERM must have a handler that raises.

    Where it meets a destructor or a weak reference's callback (many while libraries load), Python
    prints it as "ignored" with a traceback, and the command would go on.
    """
    usual = sys.unraisablehook

    def on_unraisable(unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            usual(unraisable)
            return
        # In a moment: raised in here it would be swallowed, too.
        again = threading.Timer(0.05, _interrupt_the_main_thread)
        again.daemon = True
        again.start()

    sys.unraisablehook = on_unraisable


def _interrupt_the_main_thread() -> None:
    main_thread = threading.main_thread().ident
    if main_thread is not None and hasattr(signal, "pthread_kill"):
        signal.pthread_kill(main_thread, signal.SIGTERM)  # also wakes it where it waits
    else:  # Windows
        _thread.interrupt_main(signal.SIGTERM)


def run(arguments: list[str]) -> int:
    """Run one command; returns the exit code, with every error turned into one message on standard
    error.
    """
    debug = "--debug" in arguments
    arguments = _settings_as_options([one for one in arguments if one != "--debug"])
    # Room for the last message where nothing else is left; pages that nobody touches cost nothing.
    reserve = [bytearray(RESERVE_BYTES)]
    with claimed_stdout() if "--json" in arguments else contextlib.nullcontext():
        # Threads that spin while they wait for a core slow a shared machine down tenfold; must be
        # set before torch loads.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        if not debug:
            quiet_libraries()
        try:
            result = app(args=arguments, prog_name="fastft", standalone_mode=False)
            if result == 130 and ranks.first():  # click has met the KeyboardInterrupt first
                print("interrupted", file=sys.stderr)
            return result if isinstance(result, int) else 0
        except FastFTError as error:
            return _end_with(error, debug)
        except KeyboardInterrupt:
            if ranks.first():
                print("interrupted", file=sys.stderr)
            return 130
        except BaseException as error:
            # The last door: no traceback reaches a user who did not ask for it. A panic of a
            # library in Rust (tokenizers, safetensors) is no Exception.
            if not isinstance(error, Exception) and type(error).__name__ != PANIC:
                raise
            reserve.clear()
            if hasattr(error, "show") and hasattr(error, "exit_code"):
                # click's usage errors: wrong options
                error.show()
                return 2
            if known := explained(error):
                return _end_with(known, debug)
            if ranks.tells_why():
                what = f"{type(error).__name__}: {str(error)[:LONGEST_MESSAGE]}"
                say_error(
                    f"unexpected {what}. This is a bug of fastft; --debug shows where.", debug
                )
            return 3


RESERVE_BYTES = 16 * 2**20
TAKES_SETTINGS = {"train", "data", "plan", "sweep"}
FLAGS = {"--json", "--ray", "--table"}  # options without a value
SETTING = re.compile(r"[a-z_]+(\.[a-z_0-9]+)*=.*", re.DOTALL)


def _settings_as_options(arguments: list[str]) -> list[str]:
    """Return `arguments` with each bare KEY=VALUE after a config as --set KEY=VALUE."""
    if arguments[:1] and arguments[0] not in TAKES_SETTINGS:
        return arguments
    result: list[str] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        bare = SETTING.fullmatch(argument) and (before in FLAGS or not before.startswith("-"))
        result += ["--set", argument] if bare else [argument]
    return result


def example(*lines: str) -> str:
    """Return the end of a command's help: an example of its use, or several."""
    return "\n\n".join([f"Example: {lines[0]}", *lines[1:]])


# --- the main job


@app.command(epilog=example("fastft quickstart"))
def quickstart(
    out: Annotated[Path, typer.Option("--out", help="where the run goes")] = Path("runs"),
    engine: Annotated[str, typer.Option(help="auto, unsloth, stock or mlx")] = "auto",
    as_json: Json = False,
) -> None:
    """Train the embedded tiny model, compare before and after, export, verify, chat. No network,
    no GPU.
    """
    from fastft.quickstart.command import quickstart as run_quickstart

    print_result(run_quickstart(out, engine=engine), as_json, text="")


@app.command(epilog=example("fastft init --gpu t4 --data data.jsonl -o run.yaml"))
def init(
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", help="fit it to this card (t4, mac-36 ...); default: this machine"),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Hub id or folder of the base model")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="file or Hub id of the data; default: data.jsonl")
    ] = None,
    project: Annotated[
        str | None, typer.Option("--project", help="name of the run; default: the data file's")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="write this file; default: print it")
    ] = None,
) -> None:
    """Print a commented config that fits the data and the machine, or write it to a file."""
    from fastft.config import ModelConfig
    from fastft.data.glance import glance
    from fastft.hardware import named_gpu, probe
    from fastft.planning.init import (
        EMBEDDED_ONLY_TRIES,
        commented_config,
        is_embedded,
        suggested_model,
    )

    if out is not None and out.exists():
        raise FastFTError(f"{out} exists and is not replaced. Name another file, or delete it.")
    base = model or suggested_model(named_gpu(gpu) if gpu else probe())
    source = data or "data.jsonl"
    # A file that is named must be there; the default is a place to fill in.
    seen = glance(source, ModelConfig(name=base).name) if data or Path(source).exists() else None
    text = commented_config(
        gpu=gpu, model=base, data=source, project=project, seen=seen, file=str(out or "run.yaml")
    )
    if is_embedded(base):
        print(f"note: {EMBEDDED_ONLY_TRIES}", file=sys.stderr)
    if out is None:
        return print(text, end="")
    out.write_text(text, encoding="utf-8")
    found = f" for {seen}" if seen else f"; {source} is not a file here, so nothing was looked at"
    steps = then(["fastft", "plan", out], ["fastft", "train", out])
    print(f"wrote {out}{found}{steps}", file=sys.stderr)


@app.command("config-schema", epilog=example("fastft config-schema > schema.json"))
def config_schema() -> None:
    """Print the JSON Schema of the config."""
    from fastft.config import RunConfig

    print(json.dumps(RunConfig.model_json_schema(), indent=1))


@app.command(
    epilog=example("fastft train run.yaml", "fastft train run.yaml train.max_steps=100 lora.r=32")
)
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    stop_after: Annotated[
        int | None,
        typer.Option("--stop-after", help="end after so many more steps; the schedule stays"),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option("--processes", help="train in so many processes here, one a GPU (torchrun)"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train; the same command goes on after a stop."""
    from fastft import verbs
    from fastft.config import load_config

    settings = load_config(config, overrides)
    if processes is not None and processes != 1:
        changes = [part for override in overrides or [] for part in ("--set", override)]
        slice_of = [] if stop_after is None else ["--stop-after", str(stop_after)]
        command = ["train", str(config), *changes, *slice_of]
        raise typer.Exit(_in_processes(processes, command, as_json))
    result = verbs.train(settings, stop_after=stop_after)
    if not ranks.first():
        return
    print_result(result, as_json, text=_trained(result, config))


@app.command(epilog=example("fastft sweep run.yaml --vary lora.r=8,16"))
def sweep(
    config: ConfigFile,
    vary: Annotated[
        list[str],
        typer.Option("--vary", help="--vary lora.r=8,16, or a range 1e-5..1e-3 (repeatable)"),
    ],
    overrides: Overrides = None,
    trials: Annotated[
        int | None, typer.Option("--trials", help="draw so many at random (train.seed)")
    ] = None,
    keep: Annotated[
        str, typer.Option("--keep", help="half: drop the worse half at each rung; all: none")
    ] = "half",
    processes: Annotated[
        int | None, typer.Option("--processes", help="spread the trials over so many processes")
    ] = None,
    on_ray: Annotated[
        bool, typer.Option("--ray", help="hand the trials to Ray Tune (RAY_ADDRESS)")
    ] = False,
    as_json: Json = False,
) -> None:
    """Try several settings on one loaded base; each trial is a run of its own."""
    if keep not in ("half", "all"):
        raise one_of("--keep", keep, ("half", "all"))
    if on_ray and processes is not None:
        raise FastFTError("give either --ray or --processes: Ray starts processes of its own.")
    if processes is not None and processes != 1:
        given = [("--vary", v) for v in vary] + [("--set", o) for o in overrides or []]
        given += [("--keep", keep)] + ([("--trials", str(trials))] if trials is not None else [])
        command = ["sweep", str(config), *(part for pair in given for part in pair)]
        raise typer.Exit(_in_processes(processes, command, as_json))
    from fastft import verbs
    from fastft.progress import Reporter
    from fastft.training.sweep_views import table

    found = verbs.sweep(
        config, overrides or [], vary=vary, trials=trials, keep_all=keep == "all", on_ray=on_ray
    )
    if not ranks.first():
        return
    Reporter().console.print(table(found))
    if found.best:
        run = found.best.run.path
        steps = then(["fastft", "chat", run], ["fastft", "export", run, "--to", "gguf:q4_k_m"])
        text = f"best: {run}{steps}"
    else:
        text = "best: none has a held-out loss"
    print_result(found.as_dict(), as_json, text=text)


@app.command(epilog=example("fastft data run.yaml"))
def data(config: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Show what will be trained on: formats, drops, lengths, a preview with the trained tokens in
    colour.
    """
    from fastft.config import load_config
    from fastft.data.inspect import inspect_data

    settings = load_config(config, overrides)
    report = inspect_data(settings, plot=not as_json)
    steps = then(["fastft", "plan", config], ["fastft", "train", config])
    print_result(report, as_json, text=steps.strip())


@app.command(
    epilog=example(
        "fastft chat runs/my-run", 'fastft chat runs/my-run/export/my-run.Q4_K_M.gguf -p "Hello"'
    )
)
def chat(
    target: Talker,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="a question (repeatable); without it, a conversation"),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="system prompt")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="most tokens of an answer")] = (
        Sampling.max_new_tokens
    ),
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = Sampling.temperature,
    top_p: Annotated[float, typer.Option(help="nucleus sampling")] = Sampling.top_p,
    seed: Annotated[int, typer.Option(help="seed of the sampling")] = Sampling.seed,
    compare: Annotated[
        bool, typer.Option("--compare", help="the base model's answer beside the adapter's")
    ] = False,
    base: Base = None,
    dtype: Dtype = "auto",
    lora: Loras = None,
    gpu_layers: GpuLayers = "auto",
    n_ctx: Context = None,
    as_json: Json = False,
) -> None:
    """Talk to a run, a model or a GGUF file."""
    from fastft.inference.conversation import answers, converse

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    keywords: dict[str, Any] = {"base": base, "dtype": dtype, "loras": lora, "n_ctx": n_ctx}
    keywords["gpu_layers"] = _layers(gpu_layers)
    if not prompt:
        if as_json:
            raise FastFTError("--json needs --prompt.")
        return converse(target, system=system, sampling=sampling, compare=compare, **keywords)
    result = answers(
        target,
        prompt,
        system=system,
        sampling=sampling,
        compare=compare,
        show=not as_json,
        **keywords,
    )
    print_result(result, as_json, text="")


@app.command(epilog=example("fastft export runs/my-run --to gguf:q4_k_m,ollama"))
def export(
    run: RunArgument,
    to: Annotated[
        str | None,
        typer.Option("--to", help="adapter, merged, gguf:TYPE, gguf-lora, ollama; comma-separated"),
    ] = None,
    out: Out = None,
    base: Base = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="of merged: auto, float32, bfloat16, float16")
    ] = "auto",
    certify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="write the certificate")
    ] = True,
    imatrix: Annotated[
        str | None, typer.Option("--imatrix", help="auto: from the run's own data")
    ] = None,
    quant: Annotated[
        str | None, typer.Option("--quant", help="auto: the smallest GGUF type within --max-kl")
    ] = None,
    max_kl: Annotated[
        float, typer.Option("--max-kl", help="budget of --quant auto: mean KL, nats a token")
    ] = MAX_KL,
    as_json: Json = False,
) -> None:
    """Export a run as adapter, merged model, GGUF or Ollama model, with a certificate."""
    from fastft import verbs

    result = verbs.export(
        run, to, out=out, base=base, dtype=dtype, imatrix=imatrix, quant=quant, max_kl=max_kl,
        verify=certify,
    )  # fmt: skip
    if result.certificate is None:
        print_result(result, as_json, text="\n".join(result.paths) + _use(run, result.paths))
    else:
        text = _verdicts(result.certificate) + _use(run, result.paths)
        print_result(result, as_json, text=text)
        _fail_unless_verified(result.certificate)
    if result.refused:
        names = ", ".join(one.target for one in result.refused)
        raise AnswerIsNoError(f"not written: {names} (each with its reason above).")


@app.command(epilog=example("fastft verify runs/my-run"))
def verify(
    run: RunArgument,
    out: Out = None,
    base: Base = None,
    accept_changed: Annotated[
        bool,
        typer.Option("--accept-changed", help="judge a file that was changed since as a new one"),
    ] = False,
    as_json: Json = False,
) -> None:
    """Check every exported file against the trained model; exit 1 where one is not it."""
    from fastft import verbs

    checked = verbs.verify(run, out=out, base=base, accept_changed=accept_changed)
    good = checked.verdict != "fail"
    step = then(["fastft", "push", run, "--repo", "USER/NAME"], ["fastft", "chat", run])
    print_result(checked, as_json, text=_verdicts(checked) + (step if good else ""))
    _fail_unless_verified(checked)


@app.command("eval", epilog=example("fastft eval runs/my-run --data questions.jsonl"))
def evaluate(
    target: Talker,
    data: Annotated[
        str | None, typer.Option("--data", help="the questions: any file that can be trained on")
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            help="exact_match, contains, regex, choice, choice_norm, bits_per_byte, perplexity "
            "(repeatable); auto: by the columns",
        ),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option("--tasks", help="tasks of lm-eval instead; comma-separated")
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option("--task-folder", help="your own lm-eval tasks (YAML files)")
    ] = None,
    against: Annotated[
        list[str] | None, typer.Option("--against", help="another model beside it (repeatable)")
    ] = None,
    with_base: Annotated[bool, typer.Option("--base-too/--no-base", help="ask the base")] = True,
    with_exports: Annotated[
        bool, typer.Option("--exports/--no-exports", help="ask the run's GGUF files")
    ] = True,
    at_least: Annotated[
        list[str] | None,
        typer.Option("--at-least", help="exact_match=0.9: exit 1 where the model is below it"),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="most tokens of an answer; default: by the longest expected")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="only the first rows")] = None,
    base: Base = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="where the findings go (default: the run's eval/)")
    ] = None,
    dtype: Dtype = "auto",
    gpu_layers: GpuLayers = "auto",
    n_ctx: Context = None,
    as_json: Json = False,
) -> None:
    """Ask base, adapter and exported files the same questions: values, intervals, what changed."""
    from fastft.verification import evaluation

    if (data is None) == (tasks is None):
        raise FastFTError("give the questions with --data FILE, or lm-eval's --tasks NAME.")
    floors = evaluation.parse_floors(at_least or [])
    if tasks is not None:
        from fastft.verification.harness import run_tasks

        if metric or against or out or floors or max_new_tokens or not with_base:
            raise FastFTError(
                "--tasks lets lm-eval choose what is measured of RUN: --metric, --against, --out, "
                "--at-least, --max-new-tokens and --no-base go with --data."
            )
        found = run_tasks(
            target, tasks.split(","), folder=task_folder, base=base, dtype=dtype, limit=limit
        )
    else:
        found = evaluation.evaluate(
            target, data=str(data), metric=[*(metric or ["auto"]), *floors], against=against or [],
            with_base=with_base, with_exports=with_exports, base=base, out=out,
            max_new_tokens=max_new_tokens, limit=limit, dtype=dtype,
            gpu_layers=_layers(gpu_layers), n_ctx=n_ctx,
        )  # fmt: skip
    print_result(found, as_json, text="" if as_json else evaluation.text(found))
    below = evaluation.below(found, floors)
    if below:
        print("\n".join(below), file=sys.stderr)
        raise typer.Exit(1)


@app.command(epilog=example("fastft push runs/my-run --repo user/name"))
def push(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run folder or an adapter folder")],
    repo: Annotated[
        str, typer.Option("--repo", help="user/name on the Hub; made where it is not there yet")
    ],
    private: Annotated[bool, typer.Option("--private", help="make it private")] = False,
    base_id: Annotated[
        str | None,
        typer.Option("--base-id", help="the base's public name, where it was loaded from a folder"),
    ] = None,
    include: Annotated[
        str, typer.Option("--include", help="exports to add: merged, gguf; comma-separated")
    ] = "",
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Upload adapter, model card and certified exports to the Hub, in one commit."""
    from fastft import verbs

    kinds = [part.strip() for part in include.split(",") if part.strip()]
    result = verbs.push(run, repo=repo, private=private, base_id=base_id, include=kinds, out=out)
    print_result(result, as_json, text=result.url)


@app.command(epilog=example("fastft serve runs/my-run"))
def serve(
    target: Annotated[
        str,
        typer.Argument(metavar="RUN", help="a run (its newest certified GGUF), or a .gguf file"),
    ],
    backend: Annotated[
        str, typer.Option("--with", help="llama.cpp, or vllm: merged model or adapter on a GPU")
    ] = "llama.cpp",
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on", min=1, max=65535)] = 8080,
    lora: Loras = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", help="with vllm: NAME=RUN, another adapter (repeatable)"),
    ] = None,
    gpu_layers: GpuLayers = "auto",
    n_ctx: Context = None,
    only_print: Annotated[
        bool, typer.Option("--print", help="with vllm: print the command, run nothing")
    ] = False,
    base: Base = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            envvar="FASTFT_API_KEY",
            help="key that clients must send; any --host but this machine's own needs one",
        ),
    ] = None,
) -> None:
    """Serve a run or a GGUF file with an OpenAI-compatible API."""
    from fastft.inference.serve import require_key

    require_key(host, api_key)
    if backend == "vllm":
        if api_key is not None:
            os.environ["VLLM_API_KEY"] = api_key  # not in the command line, which everyone sees
        return _serve_with_vllm(
            target, base=base, adapters=adapter or [], host=host, port=port, n_ctx=n_ctx,
            only_print=only_print,
        )  # fmt: skip
    if backend != "llama.cpp":
        raise one_of("--with", backend, ("llama.cpp", "vllm"))
    if adapter or only_print:
        raise FastFTError(
            "--adapter and --print belong to --with vllm; here it is --lora FILE.gguf."
        )
    from fastft.inference.serve import serve as run_server
    from fastft.verification.serving import gguf_of

    file, why = gguf_of(target, base=base)
    print(f"loading {file} ({why})", file=sys.stderr)
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    run_server(
        file,
        host=host,
        port=port,
        loras=lora or [],
        gpu_layers=_layers(gpu_layers),
        n_ctx=n_ctx,
        api_key=api_key,
        on_open=lambda: print(_how_to_ask(address, key=api_key is not None), file=sys.stderr),
    )


def _how_to_ask(address: str, *, key: bool) -> str:
    """Return where the server listens and a request to try."""
    header = ' -H "Authorization: Bearer $FASTFT_API_KEY"' if key else ""
    body = '{"messages": [{"role": "user", "content": "Hello"}], "temperature": 0}'
    return (
        f"serving at {address} (Ctrl-C ends it). Requests that give no temperature are sampled at "
        "1, as in OpenAI's API; fastft chat takes 0. To try it:\n"
        f"  curl {address}/chat/completions{header} -H 'Content-Type: application/json' "
        f"-d '{body}'"
    )


def _serve_with_vllm(target: str, *, only_print: bool, **how: Any) -> None:
    """Become vLLM with the run's command, or print it where vLLM is not installed."""
    import shlex

    from fastft.verification.serving import vllm_command, vllm_program

    arguments, program = vllm_command(target, **how), vllm_program()
    print(shlex.join(["vllm", *arguments]))
    if only_print or program is None:
        if program is None:
            print(
                "vLLM is not installed here; run this where it is (pip install vllm, in an "
                "environment of its own: it pins other versions of torch and transformers).",
                file=sys.stderr,
            )
        return
    sys.stdout.flush()
    os.execvp(program[0], [*program, *arguments])


# --- know before you start


@app.command(epilog=example("fastft runs"))
def runs(
    folder: Annotated[
        Path | None, typer.Argument(help="where runs are kept (output_dir; default: runs)")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the runs: status, steps, held-out loss, exports."""
    from fastft.runs import listing

    folder = folder or listing.DEFAULT_FOLDER
    found = listing.list_runs(folder)
    print_result(listing.as_json(found), as_json, text=listing.as_table(found, folder))


@app.command(epilog=example("fastft plan run.yaml --gpu t4", "fastft plan --table"))
def plan(
    config: Annotated[Path | None, typer.Argument(help="the run's YAML config")] = None,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", help="plan for this card (mac-36: a Mac) instead of this machine"),
    ] = None,
    gpus: Annotated[
        int, typer.Option("--gpus", help="plan for so many of them, a process each")
    ] = 1,
    apply: Annotated[
        Path | None,
        typer.Option("--apply", help="write the config with the changes that make it fit"),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="write the stacked bars as PNG")
    ] = None,
    table: Annotated[
        bool, typer.Option("--table", help="which model sizes fit which card")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say beforehand whether it fits: VRAM, RAM, disk, time; exit 1 where it does not."""
    from fastft.planning import command

    if table:
        rows = command.table()
        return print_result(rows, as_json, text=command.table_text(rows))
    if config is None:
        raise FastFTError("give a config (fastft plan run.yaml), or --table.")
    result = command.run(
        config, overrides, gpu=gpu, gpus=gpus, apply=apply, plot=plot, show=not as_json
    )
    fits = result.verdict != "does_not_fit"
    wanted = apply or config
    steps = then(["fastft", "data", wanted], ["fastft", "train", wanted])
    print_result(result, as_json, text=steps.strip() if fits or apply else "")
    if not fits:
        raise typer.Exit(1)


@app.command(epilog=example("fastft doctor"))
def doctor(
    quick: Annotated[
        bool, typer.Option("--quick", help="skip what takes seconds (importing Unsloth, llama.cpp)")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check this machine: versions, GPU, memory, Hub, llama.cpp, Unsloth's patches; exit 1 where
    something blocks.
    """
    from fastft.verification.doctor import doctor as examine

    report = examine(quick=quick)
    if not as_json:
        report.print()
    print_result(report, as_json, text="")
    raise typer.Exit(report.exit_code)


@app.command(epilog=example("fastft selftest --minutes 10"))
def selftest(
    minutes: Annotated[float, typer.Option("--minutes", help="the whole test takes at most")] = 10,
    out: Annotated[
        Path, typer.Option("--out", help="where selftest.json and selftest.md go")
    ] = Path("selftest"),
    as_json: Json = False,
) -> None:
    """Find out whether this machine trains exactly, fits as planned and is as fast as it should be;
    exit 1 where it does not.
    """
    from fastft.verification.selftest import selftest as test

    found = test(minutes=minutes, out=out, say=lambda line: print(line, file=sys.stderr))
    kept = f"\nkept: {out / 'selftest.md'}, {out / 'selftest.json'}"
    print_result(found, as_json, text=found.page + kept)
    raise typer.Exit(int(found.verdict == "fail"))


# --- how fast it is

app.add_typer(bench_app, name="bench")

# --- how it is printed


def _layers(text: str) -> int | str:
    if text not in ("auto", "-1") and not text.isdigit():
        raise FastFTError(f"--gpu-layers is {text!r}; it must be auto, -1 (all) or a number.")
    return text if text == "auto" else int(text)


def _trained(result: Any, config: Path) -> str:
    """Return what a training left behind and what to type next."""
    run = Path(result.run)
    lines = [f"{result.status}: {result.final or run}"]
    made = [path for path in (run / "report.md", run / "loss.png") if path.is_file()]
    lines += [f"report and loss curve: {', '.join(map(str, made))}"] if made else []
    go_on = then(["fastft", "train", config])
    use = then(["fastft", "chat", run], ["fastft", "export", run, "--to", "gguf:q4_k_m"])
    return "\n".join(lines) + (use if result.status == "done" else go_on)


def _use(run: str, paths: list[str]) -> str:
    """Return how the exported files are used, from where one stands."""
    gguf = next((p for p in paths if p.endswith(".gguf") and not p.endswith(".lora.gguf")), None)
    modelfile = next((p for p in paths if Path(p).name == "Modelfile"), None)
    steps: list[list[Any] | str] = [["fastft", "chat", gguf]] if gguf else []
    if modelfile is not None:
        create = Path(modelfile).read_text(encoding="utf-8").splitlines()
        line = next((c for c in create if "ollama create " in c), "ollama create NAME -f Modelfile")
        name = line.split("ollama create ")[1].split(" -f ")[0]
        steps.append(["ollama", "create", name, "-f", modelfile])
    return then(*(steps or [["fastft", "push", run, "--repo", "USER/NAME"]]))


def _verdicts(checked: Certificate) -> str:
    return "\n".join(f"{file.verdict:>5}  {file.path}" for file in checked.files)


def _fail_unless_verified(checked: Certificate) -> None:
    if checked.verdict == "fail":
        raise typer.Exit(1)


def _in_processes(processes: int, command: list[str], as_json: bool) -> int:
    """Run the command in several processes; returns their exit code."""
    from fastft.training.launch import launch

    if as_json:
        os.dup2(answer_descriptor(), 1)  # the first of them answers there
        command = [*command, "--json"]
    return launch(processes, [*command, *(["--debug"] if "--debug" in sys.argv else [])])


def _end_with(error: FastFTError, debug: bool) -> int:
    """Say why it ended, once for all processes of a run; returns the exit code."""
    if isinstance(error, ranks.LostProcessError) and ranks.OWN_LAUNCHER in os.environ:
        with contextlib.suppress(KeyboardInterrupt):  # the launcher has seen it, and says end
            time.sleep(ranks.LAST_WORDS_SECONDS)
        return ranks.HANGS if "timed out" in str(error).lower() else ranks.LOST
    if ranks.tells_why():
        say_error(error, debug)
    return error.exit_code


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="show tracebacks and the libraries' own messages")
    ] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit
