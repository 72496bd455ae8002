"""What runs on each machine of a TPU slice: bash, sent through gcloud's ssh and the same on all workers.

gcloud splits a command at its spaces, and where a connection breaks runs it again by itself. So a script travels as one
word of base64, and starts nothing that is already there: the run is a process of its own beside the connection, which
only shows its log. A worker knows which one it is from its machine's metadata.
"""

from __future__ import annotations

import base64
import shlex
from collections.abc import Sequence

# Before each line that is for the launcher; then come the number of the attempt, a word, the worker and its answer.
MARK = "@maskformer"

_HEAD = """\
name={name} attempt={attempt}
folder=$HOME/.maskformer/$name here=$HOME/.maskformer/$name/$attempt
ask() {{
  curl -sf --retry 3 --max-time 10 -H 'Metadata-Flavor: Google' \\
    "http://${{GCE_METADATA_IP:-metadata.google.internal}}/computeMetadata/v1/instance/attributes/$1"
}}
worker=$(ask agent-worker-number) || {{ echo "no answer from this machine's metadata server" >&2; exit 1; }}
environment=$(ask tpu-env) || exit 1
slice=$(sed -n "s/^MEGASCALE_SLICE_ID: *'\\{{0,1\\}}\\([0-9]*\\).*/\\1/p" <<< "$environment")
label=${{slice:-0}}.$worker
mkdir -p "$folder"
"""

_RUN = """\
# Starts one attempt of a run on this worker, unless it has been started, and shows its output until it ends.
{head}
begin() {{
  set -e
  # Nothing of a machine before this one, whose slices were others: only what this machine's metadata say.
  for variable in ${{!MEGASCALE_@}} ${{!TPU_WORKER_@}} TPU_PROCESS_ADDRESSES; do unset "$variable"; done
  while IFS= read -r line; do eval "$line"; done < <(
    sed -n "s/^\\(MEGASCALE_[A-Z_]*\\): *'\\{{0,1\\}}\\([A-Za-z0-9.:_-]*\\)'\\{{0,1\\}} *$/export \\1=\\2/p" \\
      <<< "$environment"
  )
  export PYTHONUNBUFFERED=1
  export MASKFORMER_DISTRIBUTED=on  # a process that finds no others is to say so, not to train alone
  cd
{setup}
  echo "$BASHPID" > "$here/pid"
  exec {command}
}}
work() {{
  trap '' HUP  # the connection may break
  trap : TERM INT  # they are for the command, and its exit code is to be kept
  ( begin )
  echo $? > "$here/code.partial"
  mv "$here/code.partial" "$here/code"
}}
show="-n 20"
if mkdir "$here" 2> /dev/null; then
  # What an attempt before this one has left would hold the chips.
  for group in "$folder"/*/group; do
    [ ! -s "$group" ] || kill -KILL -- "-$(cat "$group")" 2> /dev/null
  done
  : > "$here/log"
  set -m  # a process group of its own
  work > "$here/log" 2>&1 < /dev/null &
  echo $! > "$here/group"
  disown
  set +m
  show="-n +1"
else
  for i in {{1..100}}; do [ ! -s "$here/group" ] || break; sleep 0.1; done
fi
echo "{mark} $attempt began $label"
tail $show -s 0.2 -f --pid="$(cat "$here/group")" "$here/log" | sed -u "s/^/[$label] /"
code=$(cat "$here/code" 2> /dev/null) || code=137
echo "{mark} $attempt ended $label $code"
"""

_SIGNAL = """\
# Passes a signal to the command of an attempt. Before there is one, the attempt has nothing to save and ends.
{head}
if [ -s "$here/group" ] && [ ! -e "$here/code" ]; then
  group=$(cat "$here/group")
  case {signal} in
    KILL) kill -KILL -- "-$group" ;;
    *)
      if [ ! -s "$here/pid" ]; then echo {code} > "$here/code"; kill -KILL -- "-$group"
      elif [ {signal} = INT ]; then kill -INT -- "-$group"  # as a terminal does
      else kill -{signal} "$(cat "$here/pid")"; fi ;;
  esac
fi
exit 0
"""

_NEWEST = """\
# Which attempt was started last on this worker, and whether it runs.
{head}
newest=$(ls "$folder" | sort | tail -n 1)
here=$folder/$newest state=ended
if [ -s "$here/group" ] && [ ! -e "$here/code" ] && kill -0 -- "-$(cat "$here/group")" 2> /dev/null; then
  state=running
fi
echo "{mark} ? newest $label ${{newest:-none}} $state"
"""


def _head(name: str, attempt: str) -> str:
    return _HEAD.format(name=shlex.quote(name), attempt=shlex.quote(attempt))


def run(name: str, attempt: str, command: Sequence[str], setup: Sequence[str] = ()) -> str:
    """Bash that starts the command, in the home folder after the lines of `setup`, and shows its output.

    Args:
      name: of the run.
      attempt: starts of a run are told apart by it; they sort by time.
      command: each argument as the program is to receive it.
      setup: shell lines, which may change folder and environment; the first one that fails ends the attempt.
    """
    return _RUN.format(head=_head(name, attempt), mark=MARK, setup="\n".join(setup) or ":", command=shlex.join(command))


def send_signal(name: str, attempt: str, signal: str, code: int) -> str:
    """Bash that sends TERM, INT or KILL to the attempt; `code` is its exit code where its command was not there yet."""
    return _SIGNAL.format(head=_head(name, attempt), signal=signal, code=code)


def newest(name: str) -> str:
    """Bash that says which attempt was started last, and whether it is `running` or has `ended`."""
    return _NEWEST.format(head=_head(name, ""), mark=MARK)


def packed(script: str) -> str:
    """The script as a command that gcloud cannot take apart: no line break, no quotes, single spaces."""
    # Arguments that are not UTF-8 reach the program as the bytes that they are.
    return f"echo {base64.b64encode(script.encode('utf-8', 'surrogateescape')).decode()} | base64 -d | bash"
