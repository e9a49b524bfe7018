# Image of the gateway: docker build -f deploy/container/gateway.Dockerfile -t treeswarm-gateway .
# Without draft models and torch, which makes a quarter of a gigabyte:  --build-arg EXTRAS=serve,mqtt
# With draft models on an NVIDIA GPU:  --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS dependencies
# PyTorch's CPU builds have a tenth of the size of those with CUDA.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=serve,mqtt,draft
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
RUN python -m venv /opt/treeswarm
COPY constraints.txt ./
RUN case ",${EXTRAS}," in *,draft,*) \
        /opt/treeswarm/bin/pip install --index-url "${TORCH_INDEX}" "$(grep '^torch==' constraints.txt)" ;; \
    esac
# Install what the project needs, but not the project, so that changes of its code do not rebuild this layer: hatch sees
# empty packages.  huggingface_hub finds models on the hub by name.
COPY pyproject.toml README.md LICENSE ./
RUN mkdir -p swarm/treeswarm node/treeswarm_node client/treeswarm_client \
    && echo '__version__ = "0"' > swarm/treeswarm/__init__.py \
    && /opt/treeswarm/bin/pip install -c constraints.txt ".[${EXTRAS}]" "$(grep '^huggingface_hub==' constraints.txt)" \
    && /opt/treeswarm/bin/pip uninstall -y treeswarm

FROM ${PYTHON_IMAGE} AS wheel
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
COPY pyproject.toml README.md LICENSE ./
COPY swarm swarm
COPY node node
COPY client client
RUN pip wheel --no-deps --wheel-dir /wheels .

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="treeswarm gateway" org.opencontainers.image.licenses="Apache-2.0"
# The ids are fixed: volumes store them, and Kubernetes needs a number to verify that the user is not root.
RUN groupadd --gid 10001 treeswarm \
    && useradd --no-log-init --uid 10001 --gid 10001 --home-dir /var/lib/treeswarm --no-create-home \
        --shell /usr/sbin/nologin treeswarm \
    && install -d -o treeswarm -g treeswarm -m 0750 /var/lib/treeswarm /var/cache/treeswarm
COPY --from=dependencies /opt/treeswarm /opt/treeswarm
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    /opt/treeswarm/bin/pip install --no-cache-dir --no-deps --no-index --find-links /wheels treeswarm
COPY --chmod=0755 deploy/container/healthcheck.py /usr/local/bin/treeswarm-healthcheck
# Other machines can reach the gateway, so it does not start without --api-key-file or TREESWARM_API_KEYS.
ENV PATH=/opt/treeswarm/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    HOME=/var/lib/treeswarm \
    XDG_STATE_HOME=/var/lib/treeswarm \
    XDG_CACHE_HOME=/var/cache/treeswarm \
    HF_HOME=/var/cache/treeswarm/huggingface \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    TREESWARM_LISTEN=0.0.0.0:8000
USER 10001:10001
WORKDIR /var/lib/treeswarm
# Tokenizers and the draft model's weights.
VOLUME ["/var/cache/treeswarm"]
EXPOSE 8000
# Checks that the program is alive.  Whether the swarm behind it has all blocks, /ready says: a restart would not help.
HEALTHCHECK --interval=15s --timeout=10s --start-period=30s --retries=4 \
    CMD ["treeswarm-healthcheck", "http://127.0.0.1:8000/health"]
# The program is process 1: on SIGTERM, streams under way have five seconds to end.
STOPSIGNAL SIGTERM
ENTRYPOINT ["swarm", "serve"]
