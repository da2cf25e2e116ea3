{{- define "miaotui.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "miaotui.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* Labels of an object of one component: dict "root" $ "component" "gateway". */}}
{{- define "miaotui.labels" -}}
{{ include "miaotui.selector" .root }}
app.kubernetes.io/component: {{ .component }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{- define "miaotui.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (include "miaotui.name" .) -}}
{{- end -}}

{{- define "miaotui.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "miaotui.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "miaotui.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{/* What every pod of ours has: dict "root" $ "part" .Values.gateway. */}}
{{- define "miaotui.podCommon" -}}
serviceAccountName: {{ include "miaotui.serviceAccount" .root }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  {{- include "miaotui.podSecurity" .root | nindent 2 }}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .part.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .part.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .part.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Variables that all services read. */}}
{{- define "miaotui.environment" -}}
{{- if .Values.tls.secretName }}
- {name: MIAOTUI_TLS_DIR, value: /tls}
- {name: MIAOTUI_TLS_MUTUAL, value: {{ .Values.tls.mutual | quote }}}
- {name: MIAOTUI_TLS_SERVER_NAME, value: {{ .Values.tls.serverName | quote }}}
{{- end }}
{{- if .Values.telemetry.otlpEndpoint }}
- {name: OTEL_EXPORTER_OTLP_ENDPOINT, value: {{ printf "http://%s" .Values.telemetry.otlpEndpoint | quote }}}
{{- end }}
- {name: OTEL_METRICS_EXPORTER, value: none}
{{- end -}}

{{/* More settings: dict "prefix" "MIAOTUI_SHARD_" "settings" map. */}}
{{- define "miaotui.settings" -}}
{{- $prefix := .prefix -}}
{{- range $name, $value := .settings }}
{{- /* Numbers of YAML are floats here, and a large one would be written with an exponent. */}}
{{- if and (kindIs "float64" $value) (eq (floor $value) $value) }}{{ $value = int64 $value }}{{ end }}
- {name: {{ printf "%s%s" $prefix (upper $name) }}, value: {{ $value | toString | quote }}}
{{- end }}
{{- end -}}

{{- define "miaotui.mounts" -}}
- {name: tmp, mountPath: /tmp}
{{- if .root.Values.tls.secretName }}
- {name: tls, mountPath: /tls, readOnly: true}
{{- end }}
{{- if and .model .model.volume }}
- {name: models, mountPath: /models, readOnly: true}
{{- end }}
{{- end -}}

{{- define "miaotui.volumes" -}}
- name: tmp
  emptyDir: {sizeLimit: {{ .tmp | default "256Mi" }}}
{{- if .root.Values.tls.secretName }}
- name: tls
  secret:
    secretName: {{ .root.Values.tls.secretName }}
    defaultMode: 0440
{{- end }}
{{- if .model }}
{{- with .model.volume }}
- name: models
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Probes of a gRPC service: dict "root" $ "port" 50060 "startSeconds" 300. The kubelet's own
     gRPC probe does not speak TLS; the image's does. Only readiness asks for health: a stage
     whose neighbour is away is well, and a restart of it would help nobody. */}}
{{- define "miaotui.probes" -}}
startupProbe:
  tcpSocket: {port: {{ .port }}}
  periodSeconds: 2
  failureThreshold: {{ div .startSeconds 2 }}
livenessProbe:
  tcpSocket: {port: {{ .port }}}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 3
readinessProbe:
  {{- if .root.Values.tls.secretName }}
  exec:
    command: [python, -m, services.rpc.probe, "127.0.0.1:{{ .port }}"]
  timeoutSeconds: 10
  periodSeconds: 10
  {{- else }}
  grpc: {port: {{ .port }}}
  timeoutSeconds: 3
  periodSeconds: 3
  {{- end }}
  failureThreshold: 2
{{- end -}}

{{/* The models that are served, as YAML: models: [{prefix, ring, head, model, stages, tokenizer}].
     `prefix` is before the names of their components, `head` the gateway's setting that names their
     stage 0, `tokenizerAt` the one that names their tokenizer; the encoder has none, and a `task`. */}}
{{- define "miaotui.models" -}}
{{- $values := pick .Values "model" "stages" "tokenizer" -}}
{{- $all := list (merge (dict "prefix" "" "head" "SHARD" "tokenizerAt" "TOKENIZER" "ring" .Release.Name) $values) -}}
{{- range $name := list "generator" "transcriber" "captioner" -}}
{{- $given := get $.Values $name -}}
{{- if $given.enabled -}}
{{- $values = pick $given "model" "stages" "tokenizer" -}}
{{- $ring := printf "%s-%s" $.Release.Name $name -}}
{{- $at := upper $name -}}
{{- $all = append $all (merge (dict "prefix" (printf "%s-" $name) "head" (printf "%s_SHARD" $at) "tokenizerAt" (printf "%s_TOKENIZER" $at) "ring" $ring) $values) -}}
{{- end -}}
{{- end -}}
{{- if .Values.encoder.enabled -}}
{{- /* The gateway has the tokenizer of this model, and of no other. */ -}}
{{- $values = dict "model" (dict "path" "/opt/miaotui/encoder") "stages" .Values.encoder.stages -}}
{{- $ring := printf "%s-encoder" .Release.Name -}}
{{- $all = append $all (merge (dict "prefix" "encoder-" "head" "ENCODER_STAGES" "task" "embed" "ring" $ring) $values) -}}
{{- end -}}
{{- dict "models" $all | toYaml -}}
{{- end -}}

{{/* Values of one stage, as YAML: dict "stages" … "stage" N. */}}
{{- define "miaotui.stage" -}}
{{- $own := get (.stages.each | default dict) (toString .stage) | default dict -}}
{{- $all := omit (deepCopy .stages) "each" -}}
{{- range $name, $value := $own -}}
{{- $_ := set (ternary $all.autoscaling $all (has $name (list "maxReplicas" "queuedPerReplica"))) $name $value -}}
{{- end -}}
{{- toYaml $all -}}
{{- end -}}

{{/* Most pods that stage N may have: dict "stages" … "stage" N. */}}
{{- define "miaotui.mostReplicas" -}}
{{- $own := include "miaotui.stage" . | fromYaml -}}
{{- ternary $own.autoscaling.maxReplicas $own.replicas $own.autoscaling.enabled | int -}}
{{- end -}}

{{/* Lanes through a pod of stage N, as `ShardSettings.shares` counts them: each stage 0 has so many
     that all pods of the others are on one. dict "stages" … "stage" N. */}}
{{- define "miaotui.kvShares" -}}
{{- $stages := .stages -}}
{{- $lanes := 1 -}}
{{- range $later := untilStep 1 (int $stages.count) 1 -}}
{{- $lanes = max $lanes (include "miaotui.mostReplicas" (dict "stages" $stages "stage" $later) | int) -}}
{{- end -}}
{{- if eq (int .stage) 0 -}}
{{- $lanes -}}
{{- else -}}
{{- $heads := include "miaotui.mostReplicas" (dict "stages" $stages "stage" 0) | int -}}
{{- $own := include "miaotui.mostReplicas" . | int -}}
{{- mul $heads (div (sub (add $lanes $own) 1) $own) -}}
{{- end -}}
{{- end -}}

{{/* Seconds that a pod of a stage gets to stop: those of its settings, and some to spare. */}}
{{- define "miaotui.stageGrace" -}}
{{- $grace := get .settings "reconnect_grace" | default 30 -}}
{{- $drain := get .settings "drain_seconds" | default 10 -}}
{{- .terminationGracePeriodSeconds | default (add (ceil $grace) (ceil $drain) 15) -}}
{{- end -}}

{{/* host:port of all replicas of stage N, by DNS: dict "root" $ "prefix" "" "stage" N. */}}
{{- define "miaotui.stageAddress" -}}
{{- $set := printf "%s-%sstage-%d" (include "miaotui.name" .root) .prefix (int .stage) -}}
{{- printf "%s.%s.svc:50060" $set .root.Release.Namespace -}}
{{- end -}}

{{/* Rules of NetworkPolicies. */}}
{{- define "miaotui.egressCommon" }}
    - ports: [{port: 53, protocol: UDP}, {port: 53, protocol: TCP}]
    {{- with .Values.telemetry.otlpEndpoint }}
    - ports: [{port: {{ regexReplaceAll "^.*:" . "" | int }}, protocol: TCP}]
      {{- with $.Values.networkPolicy.otlpTo }}
      to:
        {{- toYaml . | nindent 8 }}
      {{- end }}
    {{- end }}
{{- end }}
{{- define "miaotui.metricsFrom" -}}
{{- if . }}{{ toYaml . }}{{ else }}- namespaceSelector: {}{{ end }}
{{- end }}
