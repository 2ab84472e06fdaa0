# Sourced by the other scripts: makes .venv if there is none and installs the project into it.
# Usage: environment [EXTRA]; the second call sees that nothing changed and costs nothing.

environment() {
  local extra=${1:-} spec="." stamp python
  [ -z "$extra" ] || spec=".[$extra]"
  stamp=".venv/installed-$(cksum pyproject.toml | cut -d' ' -f1)${extra:+-$extra}"
  [ ! -e "$stamp" ] || return 0
  if [ ! -x .venv/bin/python ]; then
    python=$(new_enough_python) || {
      echo "fusion needs Python 3.11 or newer, and there is none on the PATH" >&2
      return 1
    }
    echo "Making .venv with $("$python" --version)"
    "$python" -m venv .venv
  fi
  echo "Installing fusion${extra:+ ($extra)} into .venv: a few minutes the first time, most of it PyTorch"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -e "$spec"
  touch "$stamp"
}

# The first interpreter that runs (a version manager's stand-in may not) and is new enough.
new_enough_python() {
  local name
  for name in python3 python python3.14 python3.13 python3.12 python3.11; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$name"
      return 0
    fi
  done
  return 1
}
