# One target per process; every image runs it as an unprivileged user.
#
#     docker build --target gateway|router|prefill|decode|blackboard .
#
# The gateway's and the router's image hold no torch. The build arguments are pip's own settings.
FROM python:3.11-slim-bookworm AS base
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1
WORKDIR /forebay
RUN echo 'forebay:x:10001:10001::/home/forebay:/bin/sh' >> /etc/passwd && \
    install --directory --owner 10001 --group 10001 /home/forebay /cache
# What is installed depends on these alone: a change of code or of words rebuilds no dependency. The package wants some
# README.md; the true one comes with the code.
COPY pyproject.toml LICENSE ./
RUN touch README.md
COPY deploy/install deploy/container-start deploy/

FROM base AS gateway-environment
ARG PIP_FIND_LINKS PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_CERT
RUN deploy/install python3 /venv gateway

FROM base AS router-environment
ARG PIP_FIND_LINKS PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_CERT
RUN deploy/install python3 /venv router

FROM base AS blackboard-environment
ARG PIP_FIND_LINKS PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_CERT
RUN deploy/install python3 /venv blackboard

FROM base AS worker-environment
# The compiler makes kernels for the processor that the container runs on, once, into the cache volume.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
ARG PIP_FIND_LINKS PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_CERT
RUN deploy/install python3 /venv worker

FROM gateway-environment AS gateway
COPY . .
USER forebay
ENV FOREBAY_PORT=50051 FOREBAY_METRICS_PORT=9090 FOREBAY_HTTP_PORT=8000 FOREBAY_CACHE=/cache
EXPOSE 8000 50051 9090
ENTRYPOINT ["deploy/container-start", "services.gateway"]
HEALTHCHECK --interval=5s --timeout=5s --start-period=60s CMD deploy/container-start shared.healthcheck

FROM router-environment AS router
COPY . .
USER forebay
ENV FOREBAY_PORT=50051 FOREBAY_METRICS_PORT=9090
EXPOSE 50051 9090
ENTRYPOINT ["deploy/container-start", "services.router"]
HEALTHCHECK --interval=5s --timeout=5s --start-period=60s CMD deploy/container-start shared.healthcheck

FROM worker-environment AS worker
COPY . .
USER forebay
ENV FOREBAY_PORT=50051 FOREBAY_METRICS_PORT=9090 FOREBAY_CACHE=/cache
VOLUME /cache
EXPOSE 50051 9090
HEALTHCHECK --interval=5s --timeout=5s --start-period=600s CMD deploy/container-start shared.healthcheck

FROM worker AS prefill
ENTRYPOINT ["deploy/container-start", "services.prefill"]

FROM worker AS decode
ENTRYPOINT ["deploy/container-start", "services.decode"]

FROM blackboard-environment AS blackboard
COPY . .
USER forebay
EXPOSE 6379
ENTRYPOINT ["python", "-m", "cli.valkey", "--host", "0.0.0.0"]
HEALTHCHECK --interval=2s --timeout=5s --start-period=10s CMD python -m shared.healthcheck redis://127.0.0.1:6379
