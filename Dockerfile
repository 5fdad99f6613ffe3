# flearn for a GPU node of a cloud, or for any machine with Docker: docs/containers.md says how to build and run it.
#
# The default base is as new as the CUDA that the tested torch brings along (13.0: NVIDIA's driver 580 or newer). torch's wheel has
# its own CUDA libraries; of the base only what tells Docker about the driver is used. So any Debian or Ubuntu with Python 3.10 or
# newer will do: --build-arg BASE_IMAGE=ubuntu:24.04
ARG BASE_IMAGE=docker.io/nvidia/cuda:13.0.1-runtime-ubuntu24.04
FROM ${BASE_IMAGE}

LABEL org.opencontainers.image.title="flearn" \
      org.opencontainers.image.description="F-Learning: update what a language model knows by forgetting old facts first" \
      org.opencontainers.image.licenses="Apache-2.0"

# A run ends by itself, with an exit code. What can go wrong under a long one is the machine: GPUs that torch can no longer use, a
# folder that can no longer be written. `flearn doctor` looks at that; its warnings (no GPU given to the container) count as healthy.
# Offline: whether the model hub answers is not the container's health, and may take long to find out.
HEALTHCHECK --interval=5m --timeout=1m --start-period=1m CMD ["env", "HF_HUB_OFFLINE=1", "flearn", "doctor"]
ENTRYPOINT ["flearn"]
CMD ["--help"]

# For any user id, also one without a name (docker run --user): caches go below HOME, and libraries ask for a USER.
ENV PATH=/opt/flearn/.venv/bin:$PATH HOME=/flearn USER=flearn
WORKDIR /flearn

# No compiler is needed. On GPUs flearn trains with torch's fused AdamW, so none of DeepSpeed's operators is built. On a CPU DeepSpeed
# would build one, for communication that training never calls; flearn tells it not to (pipeline/train/engine.py).
# What does need one, such as DeepSpeed's CPU Adam, is not offered.
# No versions: the base decides the release, and a release has one Python. Any user may write in the working folder.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --home-dir /flearn --no-create-home flearn \
    && mkdir --parents runs .cache/huggingface \
    && chmod 0777 . runs .cache .cache/huggingface

# Dependencies: a layer that only these three files change. Installing the project without its source installs what it depends on.
# torch comes first and by its exact version, as in the Makefile. --use-pep517 builds DeepSpeed's package apart from it: its setup,
# if it sees torch, asks the base's CUDA for a compiler, and fails.
COPY setup.cfg pyproject.toml constraints.txt /opt/flearn/
RUN python3 -m venv /opt/flearn/.venv \
    && pip install --no-cache-dir --constraint /opt/flearn/constraints.txt torch \
    && pip install --no-cache-dir --use-pep517 --constraint /opt/flearn/constraints.txt /opt/flearn \
    && rm -rf /opt/flearn/build /opt/flearn/*.egg-info

# The source. --no-index: it needs nothing more. chmod: a checkout may be readable for its owner alone.
COPY . /opt/flearn
RUN chmod -R a+rX /opt/flearn/pipeline /opt/flearn/launch /opt/flearn/configs \
    && pip install --no-cache-dir --no-index --no-deps --no-build-isolation --editable /opt/flearn \
    && python -m compileall -q /opt/flearn/pipeline /opt/flearn/launch \
    && ln -s /opt/flearn/configs configs

# By number: Kubernetes can then tell that it is not root.
USER 10001
