#!/usr/bin/env bash
# A TPU slice of a GKE cluster: an image of this checkout, and a JobSet that trains in it.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/lib.sh
source "$root/launch/lib.sh"
NAME="${NAME:-}" IMAGE="${IMAGE:-}" ACCELERATOR="${ACCELERATOR:-}" TOPOLOGY="${TOPOLOGY:-}"
NAMESPACE="${NAMESPACE:-default}" MOUNT="${MOUNT:-/mnt/fmzoo}" CHIPS="${CHIPS:-4}"
WORKER="${WORKER:-0}" RESTARTS="${RESTARTS:-100}"

usage() {
  cat <<'END'
bash launch/gke.sh COMMAND [--flag=value ...] [-- arguments of python -m fmzoo.main]

commands
  image    builds launch/Dockerfile and pushes it as --image
  apply    starts the job; a preempted one starts again by itself and goes on
  logs     follows the log of host 0, or --worker=N
  delete   stops the job: fmzoo gets SIGTERM, saves and leaves. apply goes on from there

flags, or environment variables of the same names in capitals
  --name             of the job
  --namespace        of the cluster; default 'default'
  --image            such as us-docker.pkg.dev/my-project/fmzoo/fmzoo:1 (image, apply)
  --accelerator      such as tpu-v5-lite-podslice, tpu-v6e-slice, tpu-v5p-slice (apply)
  --topology         of the slice, such as 4x4 or 2x2x4 (apply)
  --chips            of a host; default 4; 8 for ct5lp-hightpu-8t and ct6e-standard-8t (apply)
  --spot             on spot nodes (apply)
  --claim            PersistentVolumeClaim that all hosts may write, such as Filestore's (apply)
  --bucket           or a bucket, by the Cloud Storage FUSE driver; made with
                     --enable-hierarchical-namespace (apply)
  --service-account  of Kubernetes, which may use the bucket (apply)
  --mount            folder of claim or bucket in the job; default /mnt/fmzoo (apply)
  --restarts         after so many the job has failed; default 100 (apply)
  --worker           host (logs)
  --dry-run          prints commands and manifest, which a shell would take, and runs nothing
END
}

product() { echo $((${1//x/*})); }  # topology: prints its number of chips

items() {  # words: prints them as a YAML list of strings
  printf '%s\n' "$@" | sed 's/[\\"]/\\&/g; s/.*/              - "&"/'
}

shared_volume() {  # prints it: where workdir and data are, for all hosts
  echo '            volumes:'
  if [ -n "${CLAIM:-}" ]; then
    echo "            - {name: shared, persistentVolumeClaim: {claimName: $CLAIM}}"
    return
  fi
  # Hosts look for files that another has just written: what is known of them is not kept.
  cat <<END
            - name: shared
              csi:
                driver: gcsfuse.csi.storage.gke.io
                volumeAttributes:
                  bucketName: $BUCKET
                  mountOptions: "implicit-dirs,metadata-cache:ttl-secs:0,\
metadata-cache:negative-ttl-secs:0"
END
}

pod() {  # prints what differs with the flags, above the container
  [ -z "${BUCKET:-}" ] || cat <<'END'
          metadata:
            annotations: {gke-gcsfuse/volumes: "true"}
END
  cat <<END
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 600  # for a checkpoint; spot nodes grant less
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $ACCELERATOR
              cloud.google.com/gke-tpu-topology: $TOPOLOGY
END
  [ -z "${SPOT:-}" ] || cat <<'END'
              cloud.google.com/gke-spot: "true"
            tolerations:
            - {key: cloud.google.com/gke-spot, operator: Equal, value: "true", effect: NoSchedule}
END
  [ -z "${SERVICE_ACCOUNT:-}" ] || echo "            serviceAccountName: $SERVICE_ACCOUNT"
}

manifest() {  # arguments of fmzoo
  local hosts=$(($(product "$TOPOLOGY") / CHIPS))
  cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
  namespace: $NAMESPACE
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  network:  # a headless service, by which the hosts of the slice find each other
    enableDNSHostnames: true
    publishNotReadyAddresses: true
  failurePolicy:
    maxRestarts: $RESTARTS
    rules:
    - {action: FailJobSet, onJobFailureReasons: [PodFailurePolicy]}
  replicatedJobs:
  - name: slice
    replicas: 1
    template:
      spec:
        parallelism: $hosts
        completions: $hosts
        backoffLimit: 0  # one lost host starts the whole slice again
        podFailurePolicy:
          rules:  # 2 is what fmzoo says of bad input, which no restart makes better
          - {action: FailJob, onExitCodes: {containerName: fmzoo, operator: In, values: [2]}}
        template:
$(pod)
            containers:
            - name: fmzoo
              image: $IMAGE
              args:
$(items "$@")
              ports:
              - containerPort: 8471  # between the hosts of the slice
              - containerPort: 8482  # of JAX's coordinator
              resources:
                limits:
                  google.com/tpu: $CHIPS
              volumeMounts:
              - {name: shared, mountPath: $MOUNT}
$(shared_volume)
END
}

apply() {  # arguments of fmzoo
  if [ -n "$dry_run" ]; then
    printf "kubectl apply --filename=- <<'END'\n%s\nEND\n" "$(manifest "$@")"
  else
    manifest "$@" | kubectl apply --filename=-
  fi
}

logs() {
  local job="jobset.sigs.k8s.io/jobset-name=$NAME" worker="batch.kubernetes.io/job-completion-index"
  run kubectl logs "--namespace=$NAMESPACE" "--selector=$job,$worker=$WORKER" --container=fmzoo \
    --tail=100 --follow
}

check() {  # flags of this command have been parsed
  [ "$command" = image ] && need image && return
  need name
  match name '[a-z]([a-z0-9-]*[a-z0-9])?' bfm-xl
  match namespace '[a-z0-9-]+' default
  match worker '[0-9]+' 0
  [ "$command" = apply ] || return 0
  need image accelerator topology
  match topology '[1-9][0-9]*x[1-9][0-9]*(x[1-9][0-9]*)?' 4x4
  match chips '[1-8]' 4
  match image '[A-Za-z0-9./:@_-]+' us-docker.pkg.dev/my-project/fmzoo/fmzoo:1
  match accelerator '[a-z0-9-]+' tpu-v5-lite-podslice
  match claim '[a-z0-9.-]+' fmzoo-filestore
  match service-account '[a-z0-9.-]+' fmzoo
  match bucket '[a-z0-9][a-z0-9._-]+' 'my-bucket, a name without gs://'
  match mount '/[A-Za-z0-9._/-]+' /mnt/fmzoo
  match restarts '[0-9]+' 100
  [ $(($(product "$TOPOLOGY") % CHIPS)) = 0 ] || die "--topology=$TOPOLOGY has" \
    "$(product "$TOPOLOGY") chips, expected a multiple of --chips=$CHIPS; correct one of the two"
  [ -n "${CLAIM:-}${BUCKET:-}" ] || die '--claim and --bucket are missing, expected a volume that' \
    'all hosts share; give one of the two'
  [ -z "${CLAIM:-}" ] || [ -z "${BUCKET:-}" ] || die "--claim=$CLAIM and --bucket=$BUCKET are" \
    'given, expected one of the two; drop the other'
  expect_workdir "$MOUNT" ${rest[@]+"${rest[@]}"}
}

main() {
  local takes='name namespace'
  command="${1:-}"
  case "$command" in
    image) takes='image' ;;
    apply)
      takes+=' image accelerator topology chips spot! claim bucket service-account mount restarts'
      ;;
    logs) takes+=' worker' ;;
    delete) ;;
    help | -h | --help) usage && exit 0 ;;
    *) die "command '$command' is unknown, expected image, apply, logs or delete; --help" \
      'explains them' ;;
  esac
  shift
  parse "$takes" "$@"
  check
  case "$command" in
    image)
      run docker build "--file=$root/launch/Dockerfile" "--tag=$IMAGE" "$root"
      run docker push "$IMAGE"
      ;;
    delete) run kubectl delete jobset "$NAME" "--namespace=$NAMESPACE" ;;
    *) "$command" ${rest[@]+"${rest[@]}"} ;;
  esac
}

main "$@"
