# The API, without torch: it knows everything about jobs and nothing of linear algebra.
FROM python:3.11.14-slim-bookworm

ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /srv

# Requirements of the extras alone: the package's own include torch.
COPY pyproject.toml constraints.txt deploy/requirements.py ./
RUN python requirements.py server broker otel > requirements.txt \
    && pip install -c constraints.txt -r requirements.txt

# Of the library its words alone.
COPY orthokv/__init__.py orthokv/
COPY orthokv/spec orthokv/spec
COPY app app
COPY migrations migrations

RUN useradd --uid 10001 --no-create-home orthokv && install -d -m 700 -o orthokv /data
USER 10001
ENV ORTHOKV_DATA_DIR=/data
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["python", "-m", "app"]
CMD ["api", "--host", "0.0.0.0"]
