#!/usr/bin/env bash
# Put a file of API keys into a release's Secret and have each of its pods read it, without a restart:
#
#   rotate-keys.sh RELEASE SECRET KEYS.toml [KUBECTL-ARGUMENT ...]
#
# Exits with 1 if a pod did not take the keys; it then goes on with the old ones, and its log says why.
set -euo pipefail

if [[ $# -lt 3 || ! -r $3 ]]; then
    echo "usage: rotate-keys.sh RELEASE SECRET KEYS.toml [KUBECTL-ARGUMENT ...]" >&2
    exit 2
fi
release=$1 secret=$2 keys=$3
shift 3

taken_at=lowkey_config_last_reload_success_timestamp_seconds

in_pod() {
    kubectl "${kubectl_arguments[@]}" exec "$pod" --container=lowkey -- "$@"
}

metric() {
    in_pod python -c 'import urllib.request as u; print(u.urlopen("http://127.0.0.1:8000/metrics").read().decode())' |
        sed -n "s/^$1 //p"
}

is_gone() {
    local found
    found=$(kubectl "${kubectl_arguments[@]}" get "$pod" --ignore-not-found --output=name) && [[ -z $found ]]
}

# Wait, for five minutes at most, until the pod has the new Secret, which the kubelet brings with its next look around, and
# its server answers. One that starts may have read the old Secret.
wait_for_pod() {
    for _ in {1..60}; do
        if [[ $(in_pod sha256sum /etc/lowkey-keys/keys | cut -d ' ' -f 1) != "$new" ]]; then
            echo "$pod: waiting for the new Secret"
        elif before=$(metric "$taken_at" 2> /dev/null) && [[ -n $before ]]; then
            return 0
        else
            echo "$pod: waiting for its server"
        fi
        ! is_gone || return 1
        sleep 5
    done
    return 1
}

# Have the pod read its keys; fails if it did not.
rotate() {
    wait_for_pod || return 1
    # tini, process 1, passes the signal on.
    in_pod sh -c 'kill -HUP 1' || return 1
    for _ in {1..20}; do
        sleep 0.5
        after=$(metric "$taken_at") && [[ -n $after && $after != "$before" ]] && return 0
    done
    return 1
}

kubectl_arguments=("$@")
kubectl "$@" create secret generic "$secret" "--from-file=keys=$keys" --dry-run=client --output=yaml |
    kubectl "$@" apply --filename=-
new=$(sha256sum < "$keys" | cut -d ' ' -f 1)
pods=$(kubectl "$@" get pods --output=name --field-selector=status.phase=Running \
    "--selector=app.kubernetes.io/name=lowkey,app.kubernetes.io/instance=$release")
if [[ -z $pods ]]; then
    echo "release $release has no pods that run" >&2
    exit 1
fi
status=0
for pod in $pods; do
    if rotate; then
        echo "$pod: took the keys of $(metric lowkey_api_keys | cut -d . -f 1) clients"
    elif is_gone; then
        echo "$pod: is gone; what comes in its place has the new Secret"
    else
        echo "$pod: did NOT take the keys; kubectl logs $pod says why" >&2
        status=1
    fi
done
exit $status
