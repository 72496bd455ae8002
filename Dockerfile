# syntax=docker/dockerfile:1
# The image that a cluster runs, with the versions that the tests were run with:
#
#   docker build --build-arg ACCELERATOR=tpu --tag REGION-docker.pkg.dev/PROJECT/maskformer/train:v1 .
#
# ACCELERATOR is cpu, tpu or gpu; EXTRAS are further ones of pyproject.toml, separated by commas.
ARG PYTHON_VERSION=3.11

FROM python:${PYTHON_VERSION}-slim-bookworm AS packages
ARG ACCELERATOR=cpu
ARG EXTRAS=gcs
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /build
COPY pyproject.toml constraints.txt ./
# An empty package stands for ours, so that this long step is done again only when what we depend on changes.
RUN --mount=type=cache,target=/root/.cache/pip \
    case "$ACCELERATOR" in \
      cpu) extras="$EXTRAS" ;; \
      tpu | gpu) extras="$ACCELERATOR${EXTRAS:+,$EXTRAS}" ;; \
      *) echo "ACCELERATOR=$ACCELERATOR: expected cpu, tpu or gpu" >&2; exit 2 ;; \
    esac && \
    mkdir maskformer && touch README.md LICENSE maskformer/__init__.py && \
    pip install --disable-pip-version-check --no-input --constraint constraints.txt ".[$extras]" && \
    pip uninstall --yes maskformer

FROM python:${PYTHON_VERSION}-slim-bookworm
# GKE mounts NVIDIA's driver there.
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 LD_LIBRARY_PATH=/usr/local/nvidia/lib64
RUN useradd --uid 1000 --create-home runner
COPY --from=packages /opt/venv /opt/venv
WORKDIR /maskformer
COPY . .
# By its path, as `make` installs it: recipes, cards and launchers lie beside the package.
RUN pip install --disable-pip-version-check --no-input --no-cache-dir --no-deps \
      --config-settings editable_mode=compat --editable . && \
    install --directory --owner=runner --group=runner runs
# By number, which Kubernetes can tell from root (runAsNonRoot).
USER 1000:1000
CMD ["maskformer", "--help"]
