# What every recipe begins with: its lines run from the repository's root, one after the other; one that fails does not
# stop the next, but the recipe then fails in the end.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
failed=0
trap 'failed=1' ERR
trap 'failed=130; exit' INT
trap 'exit $failed' EXIT
