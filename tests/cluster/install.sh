#!/bin/sh
# Debian packages that the cluster tests need; run it as root, then: ./launch.sh test -m slow tests/test_cluster_*.py
set -eu
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends openssh-server openssh-client iproute2 util-linux slurm-wlm munge
