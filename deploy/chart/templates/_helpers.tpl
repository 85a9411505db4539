{{- define "jobworker.name" -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- define "jobworker.labels" -}}
app.kubernetes.io/name: jobworker
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}
{{- define "jobworker.selector" -}}
app.kubernetes.io/name: jobworker
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}
{{- define "jobworker.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- /* The Redis URL as a variable: a secret, or the value without a password. */ -}}
{{- define "jobworker.redisEnv" -}}
- name: JOBWORKER_REDIS_URL
{{- if .Values.redis.existingSecret }}
  valueFrom:
    secretKeyRef:
      name: {{ .Values.redis.existingSecret }}
      key: {{ .Values.redis.secretKey }}
{{- else }}
  value: {{ .Values.redis.url | quote }}
{{- end }}
{{- end -}}
{{- define "jobworker.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}
{{- define "jobworker.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile:
  type: RuntimeDefault
{{- end -}}
