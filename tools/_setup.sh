# Sourced by the tools; makes .venv in the repo root and installs shear-ir there. Safe twice, from any folder.
#
#   source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
#   setup test,bench    # now in the repo root; python, pytest and shear-ir are those of .venv
#
# Every step ends in `|| return`: errexit is off inside a function whose status is tested.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

setup() { # EXTRAS, comma-separated
  cd "$ROOT" || return
  _make_venv || return
  export VIRTUAL_ENV="$ROOT/.venv"
  case ":$PATH:" in *":$VIRTUAL_ENV/bin:"*) ;; *) export PATH="$VIRTUAL_ENV/bin:$PATH" ;; esac
  _install "$1" || return
  _ensure_dot
}

_make_venv() {
  [ -x .venv/bin/pip ] && return
  local candidate
  for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3.14 python3; do
    if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "making .venv with $("$candidate" --version)"
      "$candidate" -m venv .venv
      return
    fi
  done
  echo "shear-ir needs Python 3.11 or newer with its venv module: install one, or name one with PYTHON=/path/to/python." >&2
  return 1
}

_install() { # EXTRAS
  local stamp=".venv/shear-ir-$1.stamp" wanted
  wanted="$({ echo "$ROOT $1"; cat pyproject.toml constraints.txt; } | .venv/bin/python -c \
    'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')" || return
  [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && return
  echo "installing shear-ir[$1] into .venv"
  # torch by itself first: by far the largest download, and the version that all others are resolved against.
  .venv/bin/python -m pip install --quiet --constraint constraints.txt torch || return
  .venv/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[$1]" || return
  echo "$wanted" >"$stamp"
}

_ensure_dot() { # drawing is the only thing that needs it, so its absence is said and not fatal
  command -v dot >/dev/null && return
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing Graphviz"
    { apt-get -qq update && apt-get -qq install --yes --no-install-recommends graphviz; } >/dev/null && return
  fi
  echo "Drawings need Graphviz's dot: install it with 'apt-get install graphviz' or 'brew install graphviz'." >&2
}
