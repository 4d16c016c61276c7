# The memory service, non-root, on a slim base. Build from the repository root:
#   docker build -f deploy/docker/memory_service.Dockerfile -t fot-memory .
FROM python:3.11-slim AS build
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY memory_service memory_service
COPY model_worker model_worker
# pip's own settings apply, as build secrets or arguments: on a machine without a GPU, the CPU wheel of torch is smaller.
ARG PIP_EXTRA_INDEX_URL
RUN python -m venv /opt/fot \
    && /opt/fot/bin/pip install --no-cache-dir -c constraints.txt setuptools torch \
    && /opt/fot/bin/pip install --no-cache-dir -c constraints.txt --no-build-isolation .

FROM python:3.11-slim
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /var/lib/fot fot \
    && install -d -m 0700 -o fot -g fot /var/lib/fot
COPY --from=build /opt/fot /opt/fot
ENV PATH=/opt/fot/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
VOLUME /var/lib/fot
EXPOSE 7070
STOPSIGNAL SIGTERM
ENTRYPOINT ["fot"]
CMD ["serve", "/var/lib/fot"]
