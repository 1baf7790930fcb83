# Sourced by the installs beside it: debian TEST PACKAGES... installs packages of Debian where the test fails, as root.
# The installs run at the same time and apt runs once at a time, so each waits for the one before it.
debian() {
    missing=$1
    shift
    eval "$missing" >/dev/null 2>&1 && return
    if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
        mkdir -p .run
        # The index is asked for anew only where this one does not know the package, or knows a version that is gone.
        flock .run/apt.lock sh -c '
            export DEBIAN_FRONTEND=noninteractive
            get="apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=120"
            $get "$@" || { apt-get update -qq && $get "$@"; }
        ' debian "$@" >.run/apt.log 2>&1 || cat .run/apt.log >&2
    fi
    eval "$missing" >/dev/null 2>&1 || { echo "'$missing' fails; install $*" >&2; exit 2; }
}
