# Sourced by the other scripts: makes .venv if there is none and installs the project into it.
# Usage: environment [EXTRA]; the second call sees that nothing changed and costs nothing.

environment() {
  local extra=${1:-} spec="." stamp
  [ -z "$extra" ] || spec=".[$extra]"
  stamp=".venv/installed-$(cksum pyproject.toml | cut -d' ' -f1)${extra:+-$extra}"
  [ ! -e "$stamp" ] || return 0
  if [ ! -x .venv/bin/python ]; then
    local python
    python=$(command -v python3.13 || command -v python3.12 || command -v python3.11 || command -v python3)
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
      echo "fusion needs Python 3.11 or newer; $python is $("$python" --version)" >&2
      return 1
    }
    echo "Making .venv with $("$python" --version)"
    "$python" -m venv .venv
  fi
  echo "Installing fusion${extra:+ ($extra)} into .venv: a few minutes the first time, most of it PyTorch"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -e "$spec"
  touch "$stamp"
}
